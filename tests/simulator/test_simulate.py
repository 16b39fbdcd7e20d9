"""The window simulator against loops over tokens, and against published cases."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from dit_accel.simulator import propose, simulate
from dit_accel.simulator.cli import register
from dit_accel.simulator.picture import key_map


def _sees(i: int, length: int, window: int, stride: int, dilation: int, causal: bool) -> set[int]:
    """Key coordinates that query ``i`` sees, from NATTEN's definition."""
    members = [j for j in range(length) if j % dilation == i % dilation]
    place = members.index(i)
    first = place // stride * stride
    if causal:
        leader = min(first + stride - 1, len(members) - 1)
        return {members[p] for p in range(len(members)) if leader - window < p <= place}
    leader = min(first + stride // 2, len(members) - 1)
    start = min(max(leader - window // 2, 0), len(members) - window)
    return {members[p] for p in range(start, start + window)}


def _tile(i: int, length: int, dilation: int, tile: int) -> tuple[int, int]:
    return i % dilation, i // dilation // tile


def _brute(grid, rules, tile_q, tile_k):
    """Visible pairs, visited and full brick pairs by looking at every pair of tokens."""
    seen = [[_sees(i, n, *rule) for i in range(n)] for n, rule in zip(grid, rules, strict=True)]
    places = list(itertools.product(*map(range, grid)))

    def brick(token, tile):
        return tuple(_tile(i, n, rule[2], t) for i, n, rule, t in zip(token, grid, rules, tile, strict=True))

    pairs: dict[tuple[object, object], list[bool]] = {}
    for query in places:
        for key in places:
            visible = all(k in s[q] for q, k, s in zip(query, key, seen, strict=True))
            pairs.setdefault((brick(query, tile_q), brick(key, tile_k)), []).append(visible)
    visible = sum(map(sum, pairs.values()))
    return visible, sum(any(p) for p in pairs.values()), sum(all(p) for p in pairs.values())


def _random_case(seed: int):
    rng = random.Random(seed)
    grid = tuple(rng.randint(2, 7) for _ in range(rng.choice([1, 2, 2, 3])))
    rules = []
    for n in grid:
        dilation = rng.choice([1, 1, 2])
        window = rng.randint(1, n // dilation)
        whole = window == n
        stride = 1 if whole else rng.randint(1, window)
        rules.append((window, stride, 1 if whole else dilation, rng.random() < 0.2))
    tiles = [tuple(rng.randint(1, 4) for _ in grid) for _ in range(2)]
    return grid, rules, *tiles


@pytest.mark.parametrize("seed", range(40))
def test_counts_equal_loops_over_tokens(seed: int) -> None:
    grid, rules, tile_q, tile_k = _random_case(seed)
    window, stride, dilation, causal = (tuple(part) for part in zip(*rules, strict=True))
    found = simulate(grid, window, stride, dilation, causal=causal, tile_q=tile_q, tile_k=tile_k)
    visible, visited, full = _brute(grid, rules, tile_q, tile_k)
    tokens = math.prod(grid)
    assert found.visible == pytest.approx(visible / tokens**2)
    assert (found.brick.visited, found.brick.full) == (visited, full)
    assert found.is_perfect == (visited == full)
    assert found.flop_bound == pytest.approx(tokens**2 / visible)
    block_q, block_k = math.prod(tile_q), math.prod(tile_k)
    assert found.brick.padded_bound == pytest.approx(tokens**2 / (visited * block_q * block_k))


@pytest.mark.parametrize("seed", range(10))
def test_runs_of_the_sequence_equal_loops_over_tokens(seed: int) -> None:
    grid, rules, tile_q, tile_k = _random_case(100 + seed)
    window, stride, dilation, causal = (tuple(part) for part in zip(*rules, strict=True))
    found = simulate(grid, window, stride, dilation, causal=causal, tile_q=tile_q, tile_k=tile_k).raster
    seen = [[_sees(i, n, *rule) for i in range(n)] for n, rule in zip(grid, rules, strict=True)]
    places = list(itertools.product(*map(range, grid)))
    mask = torch.tensor([[all(k in s[q] for q, k, s in zip(a, b, seen, strict=True)) for b in places] for a in places])
    visited = full = 0
    for rows in mask.split(math.prod(tile_q)):
        for block in rows.split(math.prod(tile_k), 1):
            visited += bool(block.any())
            full += bool(block.all())
    assert (found.visited, found.full) == (visited, full)


HUNYUAN, COSMOS = (30, 48, 80), (24, 44, 80)
PUBLISHED = [
    (HUNYUAN, (18, 24, 24), 1, (2, 8, 8), (2, 8, 8), 11.11, 5.44, 0.17),
    (HUNYUAN, (18, 24, 24), (16, 8, 8), (2, 8, 8), (2, 8, 8), 11.11, 11.11, 1.0),
    (HUNYUAN, (18, 24, 24), 1, (4, 8, 8), (2, 8, 8), 11.11, 5.24, 0.15),
    (HUNYUAN, (18, 24, 24), (16, 8, 8), (4, 8, 8), (2, 8, 8), 11.11, 11.11, 1.0),
    ((256, 256), (80, 80), 1, (16, 8), (16, 8), 10.24, 7.51, 0.495),
    ((256, 256), (80, 80), (16, 16), (16, 8), (16, 8), 10.24, 10.24, 1.0),
    (COSMOS, (24, 12, 24), (1, 4, 8), (4, 4, 8), (4, 4, 8), 12.22, 12.22, 1.0),
    (COSMOS, (24, 20, 40), (1, 4, 8), (4, 4, 8), (4, 4, 8), 4.40, 4.40, 1.0),
    (COSMOS, (24, 28, 56), (1, 4, 8), (4, 4, 8), (4, 4, 8), 2.24, 2.24, 1.0),
]


@pytest.mark.parametrize(("grid", "window", "stride", "tile_q", "tile_k", "flop", "tile", "full"), PUBLISHED)
def test_cases_of_hunyuan_flux_and_cosmos(grid, window, stride, tile_q, tile_k, flop, tile, full) -> None:
    found = simulate(grid, window, stride, tile_q=tile_q, tile_k=tile_k)
    assert found.flop_bound == pytest.approx(flop, abs=0.006)
    assert found.tile_bound == pytest.approx(tile, abs=0.006)
    assert found.brick.full_share == pytest.approx(full, abs=0.006)
    assert found.is_perfect == (full == 1.0)


def test_raster_tiles_of_hunyuan() -> None:
    """The notes have 3.2 and 3.3 from sampled tiles; these are all of them."""
    plain, strided = (simulate(HUNYUAN, (18, 24, 24), s, tile=(2, 8, 8)).raster for s in (1, (16, 8, 8)))
    assert plain.bound == pytest.approx(3.2, abs=0.05)
    assert strided.bound == pytest.approx(3.3, abs=0.05)
    assert plain.full == 0


def test_proposals_have_no_partial_tile_and_begin_with_the_published_one() -> None:
    first = propose(HUNYUAN, (18, 24, 24), block=128)[0]
    assert (first.window, first.tile) == ((18, 24, 24), (2, 8, 8))
    assert first.simulation.tile_bound == pytest.approx(11.11, abs=0.01)
    kept = propose(HUNYUAN, (18, 24, 24), (16, 8, 8), tile=(2, 8, 8), keep_window=True)
    assert [p.stride for p in kept] == [(16, 8, 8)]
    assert kept[0].distance == 0
    assert propose((21, 45, 80), (11, 21, 31), tile=(4, 4, 4), keep_window=True) == []


@pytest.mark.parametrize("seed", range(8))
def test_proposals_are_exact_by_loops(seed: int) -> None:
    rng = random.Random(seed)
    grid = (rng.randint(2, 6), rng.randint(2, 8))
    window = tuple(rng.randint(1, n) for n in grid)
    for proposal in propose(grid, window, block=4, limit=3):
        rules = [(w, s, 1, False) for w, s in zip(proposal.window[1:], proposal.stride[1:], strict=True)]
        _, visited, full = _brute(grid, rules, proposal.tile[1:], proposal.tile[1:])
        assert visited == full
        assert (visited, full) == (proposal.simulation.brick.visited, proposal.simulation.brick.full)


def test_picture_shows_the_row_of_the_middle_brick(tmp_path: Path) -> None:
    found = simulate((4, 8, 8), (3, 4, 4), tile=(1, 2, 2))
    levels, brick = key_map(found)
    assert brick == (2, 2, 2)
    rows = [(t.visited[i], t.full[i]) for t, i in zip(found.axis_tiles, brick, strict=True)]
    for place in itertools.product(range(4), repeat=3):
        visited = all(bool(rows[a][0][p]) for a, p in enumerate(place))
        full = all(bool(rows[a][1][p]) for a, p in enumerate(place))
        wanted = 3 if place == brick else 1 if full else 2 if visited else 0
        assert int(levels[place]) == wanted
    text = found.text(width=40).plain
    assert text.count("Q") == 2  # in the legend and in the picture
    assert text.count("▒") == int((levels == 2).sum()) + 1
    with pytest.raises(ValueError, match=r"must lie in 4x4x4, from 0, got \(4, 0, 0\)"):
        found.text((4, 0, 0))
    pytest.importorskip("matplotlib")
    for name in ("a.png", "b.svg"):
        found.save(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000
    with pytest.raises(ValueError, match=r"must end in \.png or \.svg, got 'c\.gif'"):
        found.save(tmp_path / "c.gif")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((4, 4, 4, 4), 2), "one to three axes"),
        (((4, 4), (2, 2, 2)), "window must be one number or have 2"),
        (((4, 4), (0, 2)), "window must be at least 1 token"),
        (((4, 4), (2, 2), 3), "stride must be at most the window"),
        (((4, 4), (3, 3), 1, (2, 2)), "window \\* dilation must be at most 4"),
    ],
)
def test_bad_values_raise(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        simulate(*arguments)
    with pytest.raises(ValueError, match="a tile of this grid must have 2 sizes"):
        simulate((4, 4), 2, tile=(2, 2, 2))


def _cli(*arguments: str):
    app = typer.Typer()
    app.callback()(lambda: None)
    register(app)
    return CliRunner().invoke(app, ["simulate", *arguments])


def test_command_line(tmp_path: Path) -> None:
    options = ("30x48x80", "--window", "18x24x24", "--stride", "16x8x8", "--tile", "2x8x8")
    shown = _cli(*options, "--order", "gilbert", "--propose", "2")
    assert shown.exit_code == 0, shown.output
    assert "11.11x" in shown.output
    assert "gilbert" in shown.output
    found = _cli(*options, "--json", "--propose", "1", "--picture", str(tmp_path / "p.svg"))
    data = json.loads(found.stdout)
    assert data["perfect"] is True
    assert data["brick"]["bound"] == pytest.approx(100 / 9)
    assert data["proposals"][0]["stride"] == [16, 8, 8]
    assert (tmp_path / "p.svg").exists()
    for bad, message in (("30xa", "grid must be numbers"), ("8", "causal axes of this grid are width")):
        failed = _cli(bad, "--window", "4", "--causal", "height")
        assert failed.exit_code == 2
        assert message in failed.output
