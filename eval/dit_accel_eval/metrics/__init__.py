"""Metrics of two clips with the same prompt and seed, and of sets of clips, on raw frames before any video codec.

:data:`REGISTRY` holds the paired metrics, :data:`PRESETS` groups them as projects report them, and :func:`evaluate_pair`
computes them. :mod:`dit_accel_eval.metrics.distribution` compares sets of clips. Definitions are in docs/metrics.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dit_accel_eval.metrics.catalog import PRESETS, REGISTRY
from dit_accel_eval.metrics.frames import as_frames, as_pair, as_uint8
from dit_accel_eval.metrics.pixel import (
    PSNR_CAP,
    flicker,
    ms_ssim,
    psnr,
    psnr_clip,
    ssim,
    ssim_box,
    temporal_difference,
)
from dit_accel_eval.metrics.registry import MetricRegistry, PairedMetric, evaluate
from dit_accel_eval.metrics.summary import Paired, paired

__all__ = [
    "PRESETS",
    "PSNR_CAP",
    "REGISTRY",
    "MetricRegistry",
    "Paired",
    "PairedMetric",
    "as_frames",
    "as_pair",
    "as_uint8",
    "available",
    "evaluate_pair",
    "flicker",
    "inapplicable",
    "ms_ssim",
    "paired",
    "psnr",
    "psnr_clip",
    "ssim",
    "ssim_box",
    "temporal_difference",
]


def available(name: str) -> str | None:
    """Why the metric cannot be used on this machine, ``None`` if it can.

    Raises:
        ValueError: no metric has this name.
    """
    return REGISTRY[name].missing()


def inapplicable(name: str, shape: Sequence[int]) -> str | None:
    """Why the metric is not defined for clips of this ``[T, H, W, 3]``, ``None`` if it is.

    Raises:
        ValueError: no metric has this name.
    """
    return REGISTRY[name].inapplicable(shape)


def evaluate_pair(
    clip: Any,
    reference: Any,
    names: Sequence[str] = PRESETS["standard"],
    *,
    device: str | torch.device | None = None,
    labels: tuple[str, str] = ("clip", "reference"),
) -> dict[str, float]:
    """Compute metrics of one clip against its dense twin.

    Args:
        clip: frames ``[T, H, W, 3]`` of the accelerated clip, uint8, or floating point in [0, 1].
        reference: frames of the dense clip of the same prompt and seed.
        names: names in :data:`REGISTRY`, for example ``PRESETS["svg"]``.
        device: where to compute; where the clip is by default.
        labels: what to call the clips in errors, such as the names of their files.

    Returns:
        The metrics by name. Those that are not defined for the shape, such as motion of a single frame or MS-SSIM of
        a small one, are left out; :func:`inapplicable` says why.

    Raises:
        ValueError: an unknown name, a metric that :func:`available` gives a reason against, a clip that is no clip or
            holds NaN, or clips of different shapes or numbers of frames.
    """
    return evaluate(REGISTRY, clip, reference, names, device, labels)
