"""Distance of clip features: a cheap relative of FVD for one pair, and descriptors of clips for whole sets."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel_eval.extractors import cache
from dit_accel_eval.extractors import efficientnet as lite0

__all__ = ["EXTRACTOR", "clip_drift", "describe", "frame_features", "missing"]

EXTRACTOR = lite0.NAME
_BATCH = 16


def missing() -> str | None:
    """Why the network cannot be used here, ``None`` if it can."""
    return cache.missing(EXTRACTOR)


def frame_features(frames: Tensor) -> Tensor:
    """Features ``[T, 1280]`` of frames ``[T, H, W, 3]`` in [0, 1]."""
    net = lite0.load(str(frames.device))
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return torch.cat([net(part.permute(0, 3, 1, 2)) for part in frames.split(_BATCH)])


def describe(features: Tensor) -> Tensor:
    """One vector for a clip: mean and spread of its frame features, and how much they move from frame to frame.

    Args:
        features: ``[T, D]``.

    Returns:
        float64 ``[3 D]``; the last two thirds are 0 for a single frame.
    """
    x = features.double()
    still = torch.zeros_like(x[0])
    motion = (x[1:] - x[:-1]).abs().mean(0) if len(x) > 1 else still
    return torch.cat((x.mean(0), x.std(0, correction=0), motion))


def clip_drift(a: Tensor, b: Tensor) -> float:
    """Norm of the difference of two clips' descriptors over that of the reference's.

    Args:
        a: ``[T, H, W, 3]`` in [0, 1].
        b: the reference, like ``a``.
    """
    x, y = (describe(frame_features(clip)) for clip in (a, b))
    return float((x - y).norm() / y.norm().clamp(min=1e-12))
