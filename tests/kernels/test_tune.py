"""Tile tables and their tuning, with a timer and a machine that are made up: nothing here needs a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_accel_kernels.backends import run_backend
from dit_accel_kernels.block_sparse.configs import TileConfig, tile_config
from dit_accel_kernels.tune import TileEntry, cache_file, forget, measured_tiles, read_tiles, shipped_tiles, write_tiles
from dit_accel_kernels.tune.candidates import candidates, shared_bytes
from dit_accel_kernels.tune.command import tune_command
from dit_accel_kernels.tune.measure import Case, Problem, tune_case
from dit_accel_kernels.tune.run import tune

MACHINE = {"gpu": "NVIDIA Toy 9000", "triton": "3.6.0", "arch": "sm_90", "shared_limit": 232448, "tma": True}
SITE = ("NVIDIA Toy 9000", "3.6.0")
SIZE = {"heads": 1, "tokens": 256}
CASE = Case(64, torch.float32, 64, 64)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("DIT_ACCEL_CACHE", str(tmp_path))
    forget()
    yield
    forget()


def attend(problem: Problem, config: TileConfig) -> Tensor:
    p = problem
    return run_backend("cpu", p.q, p.k, p.v, p.lists, scale=0.1, order=p.order, pooled=p.pooled, return_lse=False)[0]


class Clock:
    """Milliseconds by shape: what ran last decides."""

    def __init__(self, cost: Callable[[TileConfig], float]) -> None:
        self.cost, self.last = cost, TileConfig(1, 1, 1, 1)

    def run(self, problem: Problem, config: TileConfig) -> Tensor:
        self.last = config
        return attend(problem, config)

    def time(self, call: Callable[[], Any]) -> float:
        call()
        return self.cost(self.last)

    def options(self) -> dict[str, Any]:
        return {"machine": dict(MACHINE), "run": self.run, "timer": self.time, **SIZE}


def like_two_stages(config: TileConfig) -> float:
    return 1.0 + (config.num_stages != 2) + config.block_m / 1000 + config.num_warps / 10000


def test_the_shipped_table_serves_every_architecture_and_size() -> None:
    assert len(shipped_tiles()) > 20
    for arch in ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "hip"):
        for dim in (16, 40, 64, 72, 80, 96, 112, 128, 192, 256):
            for size in (2, 4):
                config = tile_config(arch, dim, size, 64, 64)
                assert 64 % config.block_m == 0
                assert 64 % config.block_n == 0
                assert not config.tma or arch in ("sm_90", "sm_100", "sm_103")
    assert tile_config("sm_90", 128, 2, 128, 128) == TileConfig(128, 64, 4, 3, tma=True)
    with pytest.raises(ValueError, match="at most 256"):
        tile_config("sm_90", 300, 2, 64, 64)


def test_what_was_measured_comes_first_on_that_gpu_only() -> None:
    entry = TileEntry(64, 2, 32, 32, 4, 1, False, None, 64, 64)
    write_tiles(cache_file(*SITE), [entry], gpu=SITE[0], triton=SITE[1])
    assert tile_config("sm_90", 64, 2, 64, 64, gpu=SITE) == TileConfig(32, 32, 4, 1)
    shipped = tile_config("sm_90", 64, 2, 64, 64)
    assert shipped != TileConfig(32, 32, 4, 1)
    assert tile_config("sm_90", 64, 2, 64, 64, gpu=(SITE[0], "3.7.0")) == shipped
    assert tile_config("sm_90", 64, 2, 64, 64, gpu=("Another GPU", SITE[1])) == shipped
    assert tile_config("sm_90", 64, 2, 128, 64, gpu=SITE) == tile_config("sm_90", 64, 2, 128, 64)
    assert tile_config("sm_90", 64, 4, 64, 64, gpu=SITE) == tile_config("sm_90", 64, 4, 64, 64)


def test_file_names_tell_gpus_and_releases_apart(tmp_path: Path) -> None:
    path = cache_file("NVIDIA H100 80GB HBM3", "3.6.0+git/..x")
    assert path == tmp_path / "tiles-nvidia-h100-80gb-hbm3-3.6.0-git-..x.json"
    assert path.parent == tmp_path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a readable table"),
        ("[]", "must be dit_accel.tiles version 1, got list"),
        ('{"format": "dit_accel.tiles", "version": 2}', "must be dit_accel.tiles version 1, got"),
        ('{"format": "dit_accel.tiles", "version": 1}', "must have a list of entries, got NoneType"),
        ('{"format": "dit_accel.tiles", "version": 1, "entries": [{"head_dim": 64}]}', "must have positive integers"),
    ],
)
def test_a_broken_file_is_named_and_never_stops_a_call(text: str, message: str) -> None:
    path = cache_file(*SITE)
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_tiles(path)
    assert str(path) in str(caught.value)
    assert measured_tiles(*SITE) == {}
    assert tile_config("sm_90", 64, 2, 64, 64, gpu=SITE) == tile_config("sm_90", 64, 2, 64, 64)


def test_sizes_that_are_no_power_of_two_and_unknown_fields_are_refused() -> None:
    path = cache_file(*SITE)
    row = {"head_dim": 64, "itemsize": 2, "block_m": 48, "block_n": 64, "num_warps": 4, "num_stages": 2}
    for change, message in (({}, "block_m must be a power of two, got 48"), ({"block_m": 64, "colour": 1}, "colour")):
        path.write_text(json.dumps({"format": "dit_accel.tiles", "version": 1, "entries": [row | change]}))
        with pytest.raises(ValueError, match=message):
            read_tiles(path)


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = cache_file(*SITE)
    entry = TileEntry(64, 2, 32, 32, 4, 1, False, None, 64, 64)
    write_tiles(path, [entry])

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_tiles(path, [])
    assert read_tiles(path) == [entry]
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(("dim", "limit", "tma"), [(128, 232448, True), (64, 101376, False), (256, 65536, False)])
def test_candidates_fit(dim: int, limit: int, tma: bool) -> None:
    found = candidates(dim, 2, 128, 64, shared_limit=limit, tma=tma)
    assert len(found) == len(set(found)) > 1
    for config in found:
        assert 128 % config.block_m == 64 % config.block_n == 0
        assert shared_bytes(config, dim, 2) <= limit
        assert config.tma == tma


def test_the_fastest_right_shape_wins_and_others_are_counted() -> None:
    clock = Clock(like_two_stages)
    wrong, broken, good = TileConfig(32, 32, 4, 2), TileConfig(32, 64, 4, 2), TileConfig(64, 32, 4, 2)

    def run(problem: Problem, config: TileConfig) -> Tensor:
        if config == broken:
            raise RuntimeError("out of resource: shared memory")
        out = clock.run(problem, config)
        return out + 1 if config == wrong else out

    shapes = [wrong, broken, good, TileConfig(64, 64, 4, 3)]
    default = tile_config("sm_80", 64, 4, 64, 64)
    assert default not in shapes
    outcome = tune_case(
        CASE, torch.device("cpu"), "sm_80", shared_limit=1, tma=False, timer=clock.time, run=run, shapes=shapes, **SIZE
    )
    assert (outcome.default, outcome.best, outcome.tried, outcome.failed) == (default, good, 3, 2)
    assert outcome.gain == pytest.approx(like_two_stages(default) / like_two_stages(good))


def test_a_lucky_first_measurement_does_not_win() -> None:
    default = tile_config("sm_80", 64, 4, 64, 64)
    lucky, seen = TileConfig(64, 64, 4, 2), []

    def cost(config: TileConfig) -> float:
        seen.append(config)
        return 1.0 if config == default else (0.5 if seen.count(lucky) == 1 else 1.5)

    clock = Clock(cost)
    outcome = tune_case(
        CASE, torch.device("cpu"), "sm_80", shared_limit=1, tma=False, timer=clock.time, run=clock.run, shapes=[lucky],
        **SIZE,
    )  # fmt: skip
    assert outcome.best == default
    assert outcome.gain == 1.0


def test_tune_writes_gains_keeps_what_it_did_not_measure_and_drops_what_no_longer_gains() -> None:
    other = TileEntry(128, 2, 32, 32, 4, 1, False, None, 64, 64)
    stale = TileEntry(64, 4, 16, 16, 4, 1, False, None, 128, 64)
    write_tiles(cache_file(*SITE), [other, stale])
    said: list[str] = []
    outcomes, path = tune(
        [CASE, Case(64, torch.float32, 128, 64)], device="cpu", say=said.append,
        **Clock(lambda c: 2.0 if (c.block_m, c.num_stages) != (32, 1) else 1.0).options(),
    )  # fmt: skip
    kept = measured_tiles(*SITE)
    assert path == cache_file(*SITE)
    assert kept[other.key] == other
    assert [kept[o.entry().key].block_m for o in outcomes] == [32, 32]
    assert kept[stale.key].block_m == 32
    assert said[0] == "head_dim 64, float32, blocks 64 x 64 on NVIDIA Toy 9000"
    tune([CASE], device="cpu", **Clock(lambda c: 1.0).options())
    assert CASE_KEY not in measured_tiles(*SITE)
    assert other.key in measured_tiles(*SITE)


CASE_KEY = (64, 4, 64, 64)


def test_a_dry_run_writes_nothing() -> None:
    rows, path = tune_command(
        [64], ["64x64"], "float32", dry_run=True, device="cpu", **Clock(like_two_stages).options()
    )
    assert not path.exists()
    assert rows[0]["tried"] > 3
    assert rows[0]["gain"] >= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([64], ["64x64"], "int8"), "dtype must be one of bfloat16, float16, float32, got 'int8'"),
        (([64], ["64"], "float16"), "blocks must be QUERIESxKEYS"),
        (([64], ["48x64"], "float16"), "got '48x64'"),
        (([8], ["64x64"], "float16"), "head_dim must be between 16 and 256, got 8"),
    ],
)
def test_words_that_are_not_understood(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tune_command(*arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_command_says_that_there_is_no_gpu() -> None:
    from typer.testing import CliRunner

    from dit_accel.cli import app

    result = CliRunner().invoke(app, ["tune", "--dry-run"])
    assert result.exit_code == 2
    assert "tuning needs a GPU" in result.output


@pytest.mark.gpu
def test_tuning_on_a_gpu_finds_right_shapes(tmp_path: Path) -> None:
    rows, path = tune_command([64], ["64x64"], "bfloat16", tokens=1024, heads=2)
    assert rows[0]["gain"] >= 1
    assert path.parent == tmp_path
