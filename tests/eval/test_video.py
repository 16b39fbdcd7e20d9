"""Clips written and read back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dit_accel_eval import metrics
from dit_accel_eval.video import amplified_difference, read_clip, side_by_side, to_uint8, write_clip


def moving(frames: int = 6, height: int = 48, width: int = 64) -> np.ndarray:
    """A smooth pattern that moves, so that codecs keep it."""
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    channels = [128 + 100 * np.sin((x + 3 * t) / 9 + c) * np.cos(y / 11) for c in range(3)]
    return np.stack(channels, -1).astype(np.uint8)


@pytest.mark.parametrize(("suffix", "least"), [(".mp4", 30), (".webp", 28), (".gif", 20)])
def test_round_trip(tmp_path: Path, suffix: str, least: float) -> None:
    clip = moving()
    write_clip(tmp_path / f"clip{suffix}", clip, fps=8)
    back = read_clip(tmp_path / f"clip{suffix}")
    assert back.shape == clip.shape
    assert metrics.psnr(back, clip) > least
    assert metrics.psnr(back[::-1].copy(), clip) < least  # the frames came in their order
    assert [path.name for path in tmp_path.iterdir()] == [f"clip{suffix}"]


def test_odd_sides_are_padded_for_mp4(tmp_path: Path) -> None:
    clip = moving(height=33, width=47)
    write_clip(tmp_path / "clip.mp4", clip)
    assert read_clip(tmp_path / "clip.mp4").shape == (6, 34, 48, 3)


def test_side_by_side_holds_every_panel() -> None:
    a = moving()
    b = 255 - a
    sheet = side_by_side([("dense", a), ("auto", b)], scale=2)
    assert sheet.shape[1] % 2 == 0
    assert sheet.shape[2] % 2 == 0
    np.testing.assert_array_equal(sheet[:, 20:116:2, 0:128:2], a)
    np.testing.assert_array_equal(sheet[:, 21:116:2, 132:260:2], b)
    assert (sheet[:, :20, :60] < 128).any()  # the label
    with pytest.raises(ValueError, match="one shape"):
        side_by_side([("a", a), ("b", b[:, :10])])
    with pytest.raises(ValueError, match="one shape"):
        side_by_side([])


def test_amplified_difference() -> None:
    a = np.full((2, 16, 16, 3), 100, np.uint8)
    b = a.copy()
    b[1, 3, 4] = 110
    found = amplified_difference(b, a, 4)
    assert found[0].max() == 0
    assert found[1, 3, 4].tolist() == [40, 40, 40]


def test_errors(tmp_path: Path) -> None:
    clip = moving()
    with pytest.raises(ValueError, match=r"\.mp4, \.webp or \.gif"):
        write_clip(tmp_path / "clip.avi", clip)
    with pytest.raises(ValueError, match="fps must be above 0"):
        write_clip(tmp_path / "clip.mp4", clip, fps=0)
    with pytest.raises(ValueError, match="NaN"):
        to_uint8(np.full((1, 16, 16, 3), np.nan))
    with pytest.raises(FileNotFoundError, match="no clip at"):
        read_clip(tmp_path / "nothing.mp4")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["x.mp4", "x.webp", "x.gif"])
def test_what_is_no_clip_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"this is no clip at all")
    with pytest.raises(ValueError, match=rf"{name} cannot be read as a clip"):
        read_clip(tmp_path / name)


def test_a_clip_cut_short_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.mp4"
    write_clip(path, np.zeros((4, 16, 16, 3), np.uint8))
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"x\.mp4 cannot be read"):
        read_clip(path)
