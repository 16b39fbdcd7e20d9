"""Metrics that need no network: PSNR, SSIM, MS-SSIM, flicker and the error of temporal differences."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel_eval.metrics.frames import as_frames, as_pair

__all__ = [
    "MS_SSIM_SIDE",
    "PSNR_CAP",
    "SSIM_SIDE",
    "flicker",
    "ms_ssim",
    "psnr",
    "psnr_clip",
    "ssim",
    "ssim_box",
    "temporal_difference",
]

#: Identical frames count as this many dB, so that means stay finite.
PSNR_CAP = 100.0
#: Side of SSIM's window, and the smallest frame it takes.
SSIM_SIDE = 11
#: Smallest frame side of MS-SSIM: four halvings must leave a whole window.
MS_SSIM_SIDE = SSIM_SIDE * 16
_MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def _decibel(mse: float) -> float:
    return PSNR_CAP if mse <= 0 else min(-10 * math.log10(mse), PSNR_CAP)


def psnr(clip: Any, reference: Any) -> float:
    """PSNR of each frame in dB, averaged over frames; see :func:`as_frames` for what a clip is."""
    a, b = as_pair(clip, reference)
    errors = (a - b).double().square().mean((1, 2, 3)).tolist()
    return sum(map(_decibel, errors)) / len(errors)


def psnr_clip(clip: Any, reference: Any) -> float:
    """PSNR of the clip as a whole in dB."""
    a, b = as_pair(clip, reference)
    return _decibel(float((a - b).double().square().mean()))


def _planes(clip: Any, reference: Any, side: int, what: str) -> tuple[Tensor, Tensor]:
    """Both clips as ``[T, 3, H, W]`` in double precision: single loses flat regions, and GPUs round it to TF32."""
    a, b = as_pair(clip, reference)
    if min(a.shape[1:3]) < side:
        raise ValueError(f"{what} needs frames of at least {side} pixels a side, got {tuple(a.shape[1:3])}")
    return a.double().permute(0, 3, 1, 2), b.double().permute(0, 3, 1, 2)


def ssim(clip: Any, reference: Any) -> float:
    """Structural similarity, Gaussian window of 11 with sigma 1.5 over its valid region, mean over frames.

    Raises:
        ValueError: if the frames are smaller than the window, or the clips do not fit.
    """
    a, b = _planes(clip, reference, SSIM_SIDE, "SSIM")
    mean_a, mean_b = _window_mean(a), _window_mean(b)
    spread = _window_mean(a * a) - mean_a**2 + _window_mean(b * b) - mean_b**2
    structure = (2 * (_window_mean(a * b) - mean_a * mean_b) + 0.03**2) / (spread + 0.03**2)
    luminance = (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
    return float((structure * luminance).mean())


def ssim_box(clip: Any, reference: Any) -> float:
    """Structural similarity with a box window of 11 over a zero-padded frame, as Sparse VideoGen computes it."""
    a, b = _planes(clip, reference, 1, "SSIM")

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, SSIM_SIDE, stride=1, padding=SSIM_SIDE // 2)

    mean_a, mean_b = mean(a), mean(b)
    variance_a, variance_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
    structure = (2 * covariance + 0.03**2) / (variance_a + variance_b + 0.03**2)
    return float((luminance * structure).mean())


def _window_mean(x: Tensor) -> Tensor:
    """Gaussian-weighted mean around each position of ``[N, C, H, W]`` where the window fits."""
    taps = torch.exp(-torch.arange(-5, 6, dtype=torch.float64).square() / (2 * 1.5**2))
    weights = (taps / taps.sum()).tolist()
    for dim in (3, 2):  # sums of shifted views: double precision has no fast convolution on a CPU
        size = x.shape[dim] - len(weights) + 1
        total = x.narrow(dim, 0, size) * weights[0]
        for shift, weight in enumerate(weights[1:], 1):
            total.add_(x.narrow(dim, shift, size), alpha=weight)
        x = total
    return x


def ms_ssim(clip: Any, reference: Any) -> float:
    """Multi-scale structural similarity with the five published weights, mean over frames.

    Wang, Simoncelli and Bovik, 2003: contrast and structure at each scale, luminance at the last, over the valid region
    and the channels; frames are halved by averaging. A negative mean counts as 0. (That of torchmetrics averages over
    mirrored borders, too.)

    Raises:
        ValueError: if a side has fewer than 176 pixels, or the clips do not fit.
    """
    values = []
    for a, b in zip(*(planes.split(1) for planes in _planes(clip, reference, MS_SSIM_SIDE, "MS-SSIM"))):
        product = 1.0
        for scale, weight in enumerate(_MS_SSIM_WEIGHTS):
            mean_a, mean_b = _window_mean(a), _window_mean(b)
            spread = _window_mean(a * a) - mean_a**2 + _window_mean(b * b) - mean_b**2
            score = (2 * (_window_mean(a * b) - mean_a * mean_b) + 0.03**2) / (spread + 0.03**2)
            if scale == len(_MS_SSIM_WEIGHTS) - 1:
                score = score * (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
            product *= max(float(score.mean()), 0.0) ** weight
            a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
        values.append(product)
    return sum(values) / len(values)


def flicker(clip: Any) -> float:
    """VBench's temporal flicker score: 1 minus the mean absolute difference of neighbouring frames."""
    frames = as_frames(clip)
    if len(frames) < 2:
        return 1.0
    return 1.0 - float((frames[1:] - frames[:-1]).abs().double().mean())


def temporal_difference(clip: Any, reference: Any) -> float:
    """Mean absolute error of the differences between neighbouring frames: 0 where the motion is the same.

    A constant offset from the reference costs nothing here; flicker, freezing and wrong motion do.

    Raises:
        ValueError: fewer than two frames, or clips that do not fit.
    """
    a, b = as_pair(clip, reference)
    if len(a) < 2:
        raise ValueError(f"temporal differences need at least 2 frames, got {len(a)}")
    return float(((a[1:] - a[:-1]) - (b[1:] - b[:-1])).abs().double().mean())
