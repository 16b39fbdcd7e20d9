"""Clips as files: mp4 through ffmpeg, animated webp and gif through Pillow, and clips side by side with labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dit_accel_eval.files import replacing
from dit_accel_eval.metrics import as_frames

__all__ = ["amplified_difference", "read_clip", "side_by_side", "to_uint8", "write_clip"]

Frames = npt.NDArray[np.uint8]

_LABEL_HEIGHT = 20
_GAP = 4


def to_uint8(clip: Any) -> Frames:
    """Bring a clip to uint8 ``[T, H, W, 3]``; see :func:`dit_accel_eval.metrics.as_frames` for what a clip is."""
    if isinstance(clip, np.ndarray) and clip.dtype == np.uint8 and clip.ndim == 4 and clip.shape[-1] == 3 and clip.size:
        return clip
    frames: Frames = (as_frames(clip) * 255).round().cpu().numpy().astype(np.uint8)
    return frames


def amplified_difference(clip: Any, reference: Any, gain: float = 4.0) -> Frames:
    """Absolute difference times ``gain``, black where the clips agree."""
    a, b = as_frames(clip, "clip"), as_frames(reference, "reference")
    if a.shape != b.shape:
        raise ValueError(f"clip and reference must have one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    return to_uint8(((a - b).abs() * gain).clamp(0, 1))


def side_by_side(panels: Sequence[tuple[str, Any]], *, scale: int = 1) -> Frames:
    """Put clips of one length and size next to each other, each under its label.

    Args:
        panels: label and clip.
        scale: enlarge by this whole factor.

    Returns:
        uint8 ``[T, H', W', 3]`` with even sides, as video codecs want them.

    Raises:
        ValueError: no panels, or clips of different shapes.
    """
    clips = [(label, to_uint8(clip)) for label, clip in panels]
    shapes = {clip.shape for _, clip in clips}
    if len(shapes) != 1:
        raise ValueError(f"clips side by side must have one shape, got {sorted(shapes)}")
    frames, height, width, _ = shapes.pop()
    wide = (width * scale + _GAP) * len(clips) - _GAP
    tall = height * scale + _LABEL_HEIGHT
    sheet = np.full((frames, tall + tall % 2, wide + wide % 2, 3), 255, np.uint8)
    for index, (label, clip) in enumerate(clips):
        left = index * (width * scale + _GAP)
        sheet[:, :_LABEL_HEIGHT, left : left + width * scale] = _label(label, width * scale)
        enlarged = clip.repeat(scale, axis=1).repeat(scale, axis=2)
        sheet[:, _LABEL_HEIGHT : _LABEL_HEIGHT + height * scale, left : left + width * scale] = enlarged
    return sheet


def _label(text: str, width: int) -> Frames:
    """A bar with text, made smaller until it fits."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (width, _LABEL_HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    for size in range(13, 6, -1):
        font = ImageFont.load_default(size)
        if draw.textlength(text, font=font) <= width - 4:
            break
    draw.text((2, _LABEL_HEIGHT // 2), text, fill="black", font=font, anchor="lm")
    return np.asarray(image)


def write_clip(path: str | Path, clip: Any, *, fps: float = 16.0) -> None:
    """Write a clip atomically; the suffix decides: ``.mp4``, ``.webp`` or ``.gif``.

    Raises:
        ValueError: unknown suffix, ``fps`` not above 0, or no clip.
    """
    path, frames = Path(path), to_uint8(clip)
    if not fps > 0:
        raise ValueError(f"fps must be above 0, got {fps}")
    if path.suffix not in (".mp4", ".webp", ".gif"):
        raise ValueError(f"a clip is written as .mp4, .webp or .gif, got {path.name}")
    with replacing(path) as temporary:
        if path.suffix == ".mp4":
            _write_mp4(temporary, frames, fps)
        else:
            _write_animation(temporary, frames, fps)


def _write_mp4(path: Path, frames: Frames, fps: float) -> None:
    import imageio_ffmpeg

    height, width = frames.shape[1:3]
    even = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    writer = imageio_ffmpeg.write_frames(
        str(path),
        (even.shape[2], even.shape[1]),
        fps=fps,
        codec="libx264",
        pix_fmt_out="yuv420p",
        macro_block_size=1,
        output_params=["-crf", "14", "-movflags", "+faststart"],
        ffmpeg_log_level="error",
    )
    writer.send(None)
    try:
        for frame in even:
            writer.send(np.ascontiguousarray(frame))
    finally:
        writer.close()


def _write_animation(path: Path, frames: Frames, fps: float) -> None:
    from PIL import Image

    images = [Image.fromarray(frame) for frame in frames]
    options: dict[str, Any] = {"save_all": True, "append_images": images[1:], "duration": round(1000 / fps), "loop": 0}
    if path.suffix == ".webp":
        options |= {"quality": 85, "method": 2}
    images[0].save(path, **options)


def read_clip(path: str | Path) -> Frames:
    """Read what :func:`write_clip` wrote, as uint8 ``[T, H, W, 3]``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no clip, or cut short before its first frame.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no clip at {path}")
    try:
        frames = _read_mp4(path) if path.suffix == ".mp4" else _read_animation(path)
    except (OSError, RuntimeError, StopIteration, SyntaxError) as error:  # what ffmpeg's pipe and Pillow raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise ValueError(f"{path} cannot be read as a clip: {reason}") from None
    if not frames:
        raise ValueError(f"{path} cannot be read as a clip: it has no frame")
    return np.stack(frames)


def _read_mp4(path: Path) -> list[Frames]:
    import imageio_ffmpeg

    reader = imageio_ffmpeg.read_frames(str(path), pix_fmt="rgb24")
    width, height = next(reader)["size"]
    return [np.frombuffer(data, np.uint8).reshape(height, width, 3) for data in reader]


def _read_animation(path: Path) -> list[Frames]:
    from PIL import Image, ImageSequence

    with Image.open(path) as image:
        return [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]
