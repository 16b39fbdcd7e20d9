"""What a clip is, and the checks that every metric starts with."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["as_frames", "as_pair", "as_uint8"]


def as_frames(clip: Any, name: str = "clip") -> Tensor:
    """Check a clip and bring it to float32 ``[T, H, W, 3]`` in [0, 1], on the device where it is.

    Args:
        clip: array or tensor ``[T, H, W, 3]``, uint8, or floating point in [0, 1].
        name: what to call it in errors, such as the name of its file.

    Raises:
        ValueError: wrong shape or dtype, no frames, NaN or infinity, or values outside [0, 1].
    """
    frames = torch.as_tensor(np.asarray(clip) if not isinstance(clip, Tensor) else clip).detach()
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"{name} must be frames [T, H, W, 3], got shape {tuple(frames.shape)}")
    if frames.dtype == torch.uint8:
        return frames.float() / 255
    if not frames.is_floating_point():
        raise ValueError(f"{name} must be uint8 or floating point, got {frames.dtype}")
    frames = frames.float()
    bad = int((~torch.isfinite(frames)).sum())
    if bad:
        raise ValueError(f"{name} has {bad} values that are NaN or infinite, of {frames.numel()}")
    low, high = float(frames.min()), float(frames.max())
    if low < -1e-3 or high > 1 + 1e-3:
        raise ValueError(f"{name} must lie in [0, 1] when it is floating point, got values from {low:g} to {high:g}")
    return frames.clamp(0, 1)


def as_pair(clip: Any, reference: Any, names: tuple[str, str] = ("clip", "reference")) -> tuple[Tensor, Tensor]:
    """Both clips as :func:`as_frames` gives them.

    Raises:
        ValueError: a clip is no clip, or the shapes (so also the numbers of frames) differ.
    """
    a, b = as_frames(clip, names[0]), as_frames(reference, names[1])
    if a.shape != b.shape:
        shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
        frames = f" ({len(a)} and {len(b)} frames)" if len(a) != len(b) else ""
        raise ValueError(f"{names[0]} and {names[1]} must have one shape, got {shapes}{frames}")
    return a, b


def as_uint8(clip: Any, name: str = "clip") -> npt.NDArray[np.uint8]:
    """Check a clip and bring it to uint8 ``[T, H, W, 3]`` on the CPU, as codecs and VBench see it."""
    if isinstance(clip, np.ndarray) and clip.dtype == np.uint8 and clip.ndim == 4 and clip.shape[-1] == 3 and clip.size:
        return clip
    frames: npt.NDArray[np.uint8] = (as_frames(clip, name) * 255).round().cpu().numpy().astype(np.uint8)
    return frames
