"""Clips in a report: what is on a sheet, and how it gets smaller."""

from __future__ import annotations

import base64
import io
import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dit_accel_eval.report.folder import read_run
from dit_accel_eval.report.sprites import TIERS, Sheet, Tier, encode, gallery, read_frames
from dit_accel_eval.report.verdict import worst_first


def _picture(sheet: Sheet) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(sheet.data))).convert("RGB"))


def _cell(sheet: Sheet, place: int) -> np.ndarray:
    y, x = place // sheet.columns * sheet.height, place % sheet.columns * sheet.width
    return _picture(sheet)[y : y + sheet.height, x : x + sheet.width]


def test_frames_stand_where_the_sheet_says() -> None:
    frames = np.stack([np.full((20, 32, 3), 10 * t, np.uint8) for t in range(13)])
    sheet = encode(frames, Tier(95, 512))
    assert (sheet.count, sheet.width, sheet.height) == (13, 32, 20)
    for t in range(13):
        assert abs(_cell(sheet, t).astype(int) - 10 * t).max() <= 4


def test_smaller_tiers_shrink_and_thin_out() -> None:
    frames = np.stack([np.full((40, 60, 3), 5 * t, np.uint8) for t in range(21)])
    sheet = encode(frames, Tier(60, 30, frames=5))
    assert (sheet.width, sheet.height, sheet.source) == (30, 20, (0, 5, 10, 15, 20))
    for place, t in enumerate(sheet.source):
        assert abs(_cell(sheet, place).astype(int) - 5 * t).max() <= 6


def test_long_clips_stay_within_what_webp_can_hold() -> None:
    sheet = encode(np.zeros((500, 8, 400, 3), np.uint8), Tier(50, 512))
    picture = _picture(sheet)
    assert max(picture.shape) <= 16383
    assert sheet.count == 500


def test_tiers_go_from_good_to_small() -> None:
    for better, worse in itertools.pairwise(TIERS):
        assert better.quality >= worse.quality
        assert better.side >= worse.side
        assert (better.prompts or 10**9) >= (worse.prompts or 10**9)
        assert (better.frames or 10**9) >= (worse.frames or 10**9)


def test_a_small_budget_gives_smaller_pictures_then_fewer_prompts_and_says_so(build_run, tmp_path: Path) -> None:
    prompts = [f"prompt {i}" for i in range(6)]
    run = read_run(build_run(tmp_path / "run", prompts=prompts, frames=5, rows=["dense", "adaspa 0.2"], size=(96, 128)))
    keys = [key for key, _ in worst_first(run)]
    whole = gallery(run, keys, 10**9, 10**9)
    assert len(whole.sheets) == 12
    assert whole.level == 0
    assert "smaller" not in whole.note
    sizes = [whole.size]
    for part in (4, 12):
        found = gallery(run, keys, whole.size // part, 10**6)
        assert 0 < found.size <= whole.size // part
        assert found.level > 0
        assert f"made smaller {found.level} times" in found.note
        shown = {key[1:] for key in found.sheets}
        assert shown == set(keys[: len(shown)])  # the worst stay
        if len(shown) < 6:
            assert f"Only the {len(shown)} worst of 6 prompts" in found.note
        sizes.append(found.size)
    assert sizes == sorted(sizes, reverse=True)
    nothing = gallery(run, keys, 100, 10**6)
    assert nothing.sheets == {}
    assert nothing.note == "No clip fits the size allowed."


def test_broken_clips_are_named_and_left_out(build_run, tmp_path: Path) -> None:
    folder = build_run(tmp_path / "run", prompts=["a", "b"], frames=2, rows=["dense", "auto 0.5"])
    cut, wrong = folder / "samples/auto-0.5/0000_0.npz", folder / "samples/dense/0001_0.npz"
    cut.write_bytes(cut.read_bytes()[:50])
    np.savez(wrong, frames=np.zeros((2, 4, 4), np.uint8))
    run = read_run(folder)
    found = gallery(run, [(0, 0), (1, 0)], 10**8, 10**8)
    assert set(found.sheets) == {("dense", 0, 0), ("auto 0.5", 1, 0)}
    assert len(found.problems) == 2
    assert any("auto-0.5/0000_0.npz cannot be read" in p for p in found.problems)
    assert any("dense/0001_0.npz must hold uint8 frames [T, H, W, 3]" in p for p in found.problems)


def test_pickles_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, frames=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="cannot be read"):
        read_frames(path)
