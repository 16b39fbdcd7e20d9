"""The folder of a run, and processes that share it."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dit_accel_eval.files
from dit_accel_eval.runs import EvalError, Ranks
from dit_accel_eval.runs.folder import RunFolder, slugs
from dit_accel_eval.runs.settings import Sample

FRAMES = np.zeros((2, 4, 4, 3), np.uint8)


def test_slugs_are_plain_and_unique() -> None:
    found = slugs(["dense", "auto 0.5", "auto  0.5", "Größe/../x", "..."])
    assert found == {
        "dense": "dense",
        "auto 0.5": "auto-0.5",
        "auto  0.5": "auto-0.5-2",
        "Größe/../x": "gr-e-..-x",
        "...": "row",
    }


def test_leftovers_of_a_killed_process_go(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, ["dense"], rank=1)
    folder.open()
    mine = tmp_path / "samples" / "dense" / ".tmp-r1-0000_0-abcd.npz"
    other = mine.with_name(".tmp-r0-0000_0-abcd.npz")
    for path in (mine, other):
        path.write_bytes(b"half")
    folder.close()
    folder.open()
    assert not mine.exists()
    assert other.exists()  # that process may be writing
    folder.close()


def test_a_second_process_of_the_same_rank_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    first, second, neighbour = (RunFolder(tmp_path, ["dense"], rank=rank) for rank in (0, 0, 1))
    first.open()
    with pytest.raises(EvalError, match=r"another process writes to .* already \(rank 0\)"):
        second.open()
    neighbour.open()
    first.close()
    second.open()
    for folder in (second, neighbour):
        folder.close()


def test_the_record_comes_after_the_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path, ["dense"])
    folder.open()
    sample = Sample(0, 0)

    def full(path: Path, data: Any, **_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dit_accel_eval.runs.folder.write_json", full)
    with pytest.raises(
        EvalError, match=r"no space left .* while writing .*0000_0\.json; all finished samples are kept"
    ):
        folder.save("dense", sample, {}, FRAMES)
    assert folder.clip_path("dense", sample).is_file()
    assert not folder.has("dense", sample)
    folder.close()


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path, ["dense"])
    folder.open()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(EvalError, match=r"no space left .*0000_0\.npz"):
        folder.save("dense", Sample(0, 0), {}, FRAMES)
    assert not list((tmp_path / "samples" / "dense").iterdir())
    folder.close()


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, ["dense"])
    folder.open()
    sample = Sample(0, 0)
    folder.save("dense", sample, {"a": 1}, FRAMES)
    assert folder.clip("dense", sample).shape == FRAMES.shape
    folder.clip_path("dense", sample).write_bytes(b"no zip")
    folder.record_path("dense", sample).write_text("[]")
    with pytest.raises(EvalError, match=r"0000_0\.npz cannot be read"):
        folder.clip("dense", sample)
    with pytest.raises(EvalError, match=r"0000_0\.json must hold a JSON object"):
        folder.records("dense", [sample])
    folder.close()


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EvalError, match=r"cannot write .*file/run"):
        RunFolder(tmp_path / "file" / "run", ["dense"]).open()


def test_ranks_come_from_the_environment() -> None:
    assert Ranks.from_env({}) == Ranks()
    found = Ranks.from_env({"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "1"})
    assert (found.rank, found.world, found.local) == (2, 4, 1)
    for bad in ({"RANK": "x"}, {"RANK": "4", "WORLD_SIZE": "4"}):
        with pytest.raises(EvalError, match="RANK"):
            Ranks.from_env(bad)


def test_every_item_belongs_to_one_rank() -> None:
    items = list(range(11))
    parts = [Ranks(rank, 3).mine(items) for rank in range(3)]
    assert sorted(item for part in parts for item in part) == items
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_waiting_ends_with_what_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "ranks").mkdir()
    left = [[tmp_path / "a", tmp_path / "b"], [tmp_path / "a"], []]
    Ranks(0, 2).wait(tmp_path, lambda: left.pop(0), "samples")
    assert not left


def test_waiting_ends_when_another_process_fails(tmp_path: Path) -> None:
    (tmp_path / "ranks").mkdir()
    first, second = Ranks(0, 2), Ranks(1, 2)

    def missing() -> list[Path]:
        second.failed(tmp_path, ValueError("out of luck"))
        return [tmp_path / "a"]

    with pytest.raises(EvalError, match="process 1 failed while samples were waited for: ValueError: out of luck"):
        first.wait(tmp_path, missing, "samples")
    second.begin(tmp_path)
    assert not list((tmp_path / "ranks").iterdir())


def test_waiting_ends_when_nothing_comes(tmp_path: Path) -> None:
    (tmp_path / "ranks").mkdir()
    with pytest.raises(EvalError, match="1 are missing, such as .*a; all finished samples are kept"):
        Ranks(0, 2, patience=0.2).wait(tmp_path, lambda: [tmp_path / "a"], "samples")


def test_temporary_names_tell_their_owner(tmp_path: Path) -> None:
    with dit_accel_eval.files.replacing(tmp_path / "x.json", owner="r3") as temporary:
        assert temporary.name.startswith(".tmp-r3-x-")
        assert temporary.suffix == ".json"
        temporary.write_text("{}")
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
