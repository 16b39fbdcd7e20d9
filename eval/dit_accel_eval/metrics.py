"""Paired metrics of two clips with the same prompt and seed, on raw frames, before any video codec.

PSNR is in dB on [0, 1], SSIM is Gaussian (11 taps, sigma 1.5, valid region), as TeaCache and PAB compute them; temporal
flicker is VBench's score, 1 for a still clip.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["PSNR_CAP", "Paired", "as_frames", "flicker", "paired", "psnr", "psnr_clip", "ssim"]

#: Identical frames count as this many dB, so that means stay finite.
PSNR_CAP = 100.0
_SSIM_SIDE = 11


@dataclass(frozen=True)
class Paired:
    """How far a clip is from its dense twin.

    Attributes:
        psnr: mean over frames of the PSNR of each, dB.
        psnr_clip: PSNR of the whole clip's mean squared error, dB.
        ssim: mean over frames, 1 for equal clips.
        flicker: temporal flicker score of the clip, 1 for a still one.
        flicker_difference: ``flicker`` minus that of the dense clip; above 0 is stiller than dense.
    """

    psnr: float
    psnr_clip: float
    ssim: float
    flicker: float
    flicker_difference: float

    def to_dict(self) -> dict[str, float]:
        """Plain JSON types."""
        return asdict(self)


def as_frames(clip: Any, name: str = "clip") -> Tensor:
    """Check a clip and bring it to float32 ``[T, H, W, 3]`` in [0, 1], on the device where it is.

    Args:
        clip: array or tensor ``[T, H, W, 3]``, uint8, or floating point in [0, 1].
        name: what to call it in errors.

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


def _pair(clip: Any, reference: Any) -> tuple[Tensor, Tensor]:
    a, b = as_frames(clip, "clip"), as_frames(reference, "reference")
    if a.shape != b.shape:
        raise ValueError(f"clip and reference must have one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    return a, b


def _decibel(mse: float) -> float:
    return PSNR_CAP if mse <= 0 else min(-10 * math.log10(mse), PSNR_CAP)


def psnr(clip: Any, reference: Any) -> float:
    """PSNR of each frame in dB, averaged over frames; see :func:`as_frames` for what a clip is."""
    a, b = _pair(clip, reference)
    errors = (a - b).double().square().mean((1, 2, 3)).tolist()
    return sum(map(_decibel, errors)) / len(errors)


def psnr_clip(clip: Any, reference: Any) -> float:
    """PSNR of the clip as a whole in dB."""
    a, b = _pair(clip, reference)
    return _decibel(float((a - b).double().square().mean()))


def ssim(clip: Any, reference: Any) -> float:
    """Structural similarity, Gaussian window of 11 with sigma 1.5, mean over frames.

    Raises:
        ValueError: if the frames are smaller than the window, or the clips do not fit.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    a, b = _pair(clip, reference)
    if min(a.shape[1:3]) < _SSIM_SIDE:
        raise ValueError(f"SSIM needs frames of at least {_SSIM_SIDE} pixels a side, got {tuple(a.shape[1:3])}")
    if a.is_cuda:  # torch rounds the inputs of float32 convolutions to TF32 there, which shows in the fourth digit
        a, b = a.double(), b.double()
    # torchmetrics averages over borders that it mirrors; the common convention leaves them out.
    _, full = structural_similarity_index_measure(
        a.permute(0, 3, 1, 2), b.permute(0, 3, 1, 2), sigma=1.5, kernel_size=11, data_range=1.0, return_full_image=True
    )
    border = _SSIM_SIDE // 2
    return float(full[..., border:-border, border:-border].double().mean())


def flicker(clip: Any) -> float:
    """VBench's temporal flicker score: 1 minus the mean absolute difference of neighbouring frames."""
    frames = as_frames(clip)
    if len(frames) < 2:
        return 1.0
    return 1.0 - float((frames[1:] - frames[:-1]).abs().double().mean())


def paired(clip: Any, reference: Any) -> Paired:
    """All of them.

    Args:
        clip: frames ``[T, H, W, 3]`` of the accelerated clip.
        reference: frames of the dense clip of the same prompt and seed.

    Raises:
        ValueError: if the shapes differ or a clip is no clip, see :func:`as_frames`.
    """
    a, b = _pair(clip, reference)
    own = flicker(a)
    return Paired(psnr(a, b), psnr_clip(a, b), ssim(a, b), own, own - flicker(b))
