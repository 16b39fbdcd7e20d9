"""Clips as sheets of still frames in WebP, made smaller step by step until they fit a budget of bytes."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dit_accel_eval.report.folder import Run
from dit_accel_eval.video import Frames

__all__ = ["Gallery", "Sheet", "Tier", "encode", "gallery", "read_frames"]

_SIDE_LIMIT = 16000  # WebP ends at 16383 pixels a side
_SAMPLED = 3
_SAFETY = 1.08


@dataclass(frozen=True)
class Tier:
    """How clips are shown.

    Attributes:
        quality: of WebP, 0 to 100.
        side: longest side of a frame in pixels.
        frames: most frames, evenly spread; ``None`` is all.
        prompts: most prompts, the worst first; ``None`` is all.
    """

    quality: int
    side: int
    frames: int | None = None
    prompts: int | None = None


#: From the best pictures to the smallest file. Fewer prompts come before pictures that nobody can judge.
TIERS = (
    Tier(88, 512),
    Tier(78, 512),
    Tier(68, 384),
    Tier(58, 320),
    Tier(52, 256),
    Tier(52, 256, None, 48),
    Tier(52, 256, None, 24),
    Tier(52, 256, 65, 16),
    Tier(48, 224, 49, 12),
    Tier(45, 192, 49, 8),
    Tier(42, 160, 33, 6),
    Tier(40, 128, 25, 4),
    Tier(35, 128, 17, 2),
    Tier(30, 96, 9, 1),
)


@dataclass(frozen=True)
class Sheet:
    """One clip.

    Attributes:
        data: base64 of a WebP picture with the frames row by row.
        columns: frames in a row.
        count: frames.
        width: of a frame.
        height: of a frame.
        source: index of each frame in the raw clip.
    """

    data: str
    columns: int
    count: int
    width: int
    height: int
    source: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """All but the picture."""
        shape = {"columns": self.columns, "count": self.count, "width": self.width, "height": self.height}
        return {**shape, "source": list(self.source)}


@dataclass(frozen=True)
class Gallery:
    """Clips of a report.

    Attributes:
        sheets: by configuration name, prompt index and seed.
        tier: how they are shown, ``None`` where there are none.
        level: how often pictures were made smaller to fit.
        note: what the reader must know about them.
        problems: clips that could not be read.
    """

    sheets: dict[tuple[str, int, int], Sheet]
    tier: Tier | None
    level: int
    note: str
    problems: tuple[str, ...]

    @property
    def size(self) -> int:
        """Bytes of base64 text."""
        return sum(len(sheet.data) for sheet in self.sheets.values())


def read_frames(path: Path) -> Frames:
    """Raw frames of a sample, uint8 ``[T, H, W, 3]``.

    Raises:
        ValueError: the file is broken or holds something else, with its name.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            frames = archive["frames"]
    except Exception as error:  # zip, zlib, pickle and OS errors alike: all mean that there is no clip
        raise ValueError(f"{path.parent.name}/{path.name} cannot be read: {error}") from error
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise ValueError(
            f"{path.parent.name}/{path.name} must hold uint8 frames [T, H, W, 3], got {frames.dtype} {frames.shape}"
        )
    return frames  # type: ignore[no-any-return]


def encode(frames: Frames, tier: Tier) -> Sheet:
    """Put the frames of a clip on one sheet.

    Args:
        frames: uint8 ``[T, H, W, 3]``.
        tier: how.
    """
    from PIL import Image

    total, height, width = frames.shape[:3]
    scale = min(1.0, tier.side / max(height, width))
    small = max(1, round(width * scale)), max(1, round(height * scale))
    per_sheet = (_SIDE_LIMIT // small[0]) * (_SIDE_LIMIT // small[1])
    count = min(total, tier.frames or total, per_sheet)
    source = [round(i) for i in np.linspace(0, total - 1, count)]
    columns = min(count, max(1, math.ceil(math.sqrt(count * small[1] / small[0]))), _SIDE_LIMIT // small[0])
    sheet = Image.new("RGB", (columns * small[0], -(-count // columns) * small[1]))
    for place, index in enumerate(source):
        picture = Image.fromarray(frames[index])
        if picture.size != small:
            picture = picture.resize(small, Image.Resampling.LANCZOS)
        sheet.paste(picture, (place % columns * small[0], place // columns * small[1]))
    buffer = io.BytesIO()
    sheet.save(buffer, "WEBP", quality=tier.quality, method=4)
    data = base64.b64encode(buffer.getvalue()).decode()
    return Sheet(data, columns, count, small[0], small[1], tuple(source))


@dataclass(frozen=True)
class _Clip:
    name: str
    key: tuple[int, int]
    path: Path


def _clips(run: Run, keys: Sequence[tuple[int, int]]) -> list[_Clip]:
    """Clips of the rows by prompt, in the order of ``keys``."""
    paths = {(s.name, s.key): s.frames for row in run.rows for s in run.good(row.name)}
    found = []
    for key in keys:
        for row in run.rows:
            path = paths.get((row.name, key))
            if path is not None:
                found.append(_Clip(row.name, key, path))
    return found


def _encode_all(
    clips: Iterable[_Clip], tier: Tier, budget: int, problems: dict[Path, str], on_clip: Callable[[], None]
) -> dict[tuple[str, int, int], Sheet] | None:
    """Sheets of all clips, or ``None`` as soon as they are too large."""
    sheets, size = {}, 0
    for clip in clips:
        if clip.path in problems:
            continue
        try:
            sheet = encode(read_frames(clip.path), tier)
        except ValueError as error:
            problems[clip.path] = str(error)
            continue
        size += len(sheet.data)
        if size > budget:
            return None
        sheets[(clip.name, *clip.key)] = sheet
        on_clip()
    return sheets


def _too_large(clips: Sequence[_Clip], tier: Tier, budget: int) -> bool:
    """Guess from a few clips, so that a large run is not encoded again and again."""
    places = np.linspace(0, len(clips) - 1, min(_SAMPLED, len(clips))).astype(int)
    sizes = []
    for clip in (clips[i] for i in places):
        try:
            sizes.append(len(encode(read_frames(clip.path), tier).data))
        except ValueError:
            continue
    return bool(sizes) and sum(sizes) / len(sizes) * len(clips) > budget * _SAFETY


def _note(tier: Tier, level: int, shown: int, known: int, sheets: Iterable[Sheet], limit: int) -> str:
    """What was done to the pictures."""
    first = next(iter(sheets))
    text = (
        f"Clips are shown as WebP stills of quality {tier.quality}, {first.width} x {first.height} pixels; "
        "all numbers were measured on the raw frames."
    )
    if level:
        text += f" They were made smaller {level} times to keep the file below {limit / 1e6:.1f} MB."
    if shown < known:
        text += f" Only the {shown} worst of {known} prompts have clips here; the raw frames of all are in samples/."
    if any(sheet.source[-1] + 1 > sheet.count for sheet in sheets):
        text += " Some frames are left out, evenly spread."
    return text


def gallery(
    run: Run, keys: Sequence[tuple[int, int]], budget: int, limit: int, on_clip: Callable[[], None] = lambda: None
) -> Gallery:
    """Encode the clips of a run within a budget.

    Args:
        run: the run.
        keys: prompt index and seed, those that matter most first.
        budget: bytes of base64 text.
        limit: bytes of the whole report, for the note.
        on_clip: called after each clip.
    """
    problems: dict[Path, str] = {}
    everything = _clips(run, keys)
    if not everything:
        return Gallery({}, None, 0, "No raw frames were kept, so there are no clips to show.", ())
    with_clips = list(dict.fromkeys(clip.key for clip in everything))
    level = 0
    for tier in TIERS:
        chosen = set(with_clips[: tier.prompts])
        clips = [clip for clip in everything if clip.key in chosen]
        if _too_large(clips, tier, budget):
            level += 1
            continue
        sheets = _encode_all(clips, tier, budget, problems, on_clip)
        if sheets:
            note = _note(tier, level, len(chosen), len(with_clips), sheets.values(), limit)
            return Gallery(sheets, tier, level, note, tuple(problems.values()))
        level += sheets is None
    note = "No clip could be read." if len(problems) == len(everything) else "No clip fits the size allowed."
    return Gallery({}, None, level, note, tuple(problems.values()))
