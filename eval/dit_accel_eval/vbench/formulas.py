"""VBench's formulas (arXiv 2311.17982) on uint8 frames, with the networks left to callables.

Verbatim from the published evaluation: which frames are paired, where numbers are clamped, and the thresholds.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Flow",
    "Frames",
    "Interpolate",
    "consistency",
    "dynamic_degree",
    "is_static",
    "middle_frames",
    "motion_smoothness",
    "temporal_flickering",
]

Frames = npt.NDArray[np.uint8]
#: From two frames ``[H, W, 3]`` to the one halfway between.
Interpolate = Callable[[Frames, Frames], Frames]
#: From two frames ``[H, W, 3]`` to the flow ``[H, W, 2]`` in pixels.
Flow = Callable[[Frames, Frames], npt.NDArray[np.float32]]


def consistency(features: Tensor) -> float:
    """Subject and background consistency: likeness of each frame to the one before and to the first.

    Args:
        features: ``[T, D]``, one row for each frame.

    Returns:
        Mean over frames from the second on of half the sum of both cosines, each at least 0.

    Raises:
        ValueError: fewer than two frames.
    """
    if len(features) < 2:
        raise ValueError(f"consistency needs at least 2 frames, got {len(features)}")
    x = F.normalize(features.double(), dim=-1)
    before = (x[1:] * x[:-1]).sum(-1).clamp(min=0)
    first = (x[1:] * x[:1]).sum(-1).clamp(min=0)
    return float(((before + first) / 2).mean())


def _mean_difference(a: Frames, b: Frames) -> float:
    return float(np.abs(a.astype(np.int16) - b.astype(np.int16)).mean())


def temporal_flickering(frames: Frames) -> float:
    """1 minus the mean absolute difference of neighbouring frames ``[T, H, W, 3]``, on 0..255.

    Raises:
        ValueError: fewer than two frames.
    """
    if len(frames) < 2:
        raise ValueError(f"temporal flickering needs at least 2 frames, got {len(frames)}")
    differences = [_mean_difference(a, b) for a, b in pairwise(frames)]
    return float((255 - np.mean(differences)) / 255)


def motion_smoothness(frames: Frames, interpolate: Interpolate) -> float:
    """How well the frames in between are guessed from every second frame.

    Raises:
        ValueError: fewer than three frames.
    """
    if len(frames) < 3:
        raise ValueError(f"motion smoothness needs at least 3 frames, got {len(frames)}")
    kept, dropped = frames[0::2], frames[1::2]
    errors = [_mean_difference(interpolate(a, b), wanted) for a, b, wanted in zip(kept[:-1], kept[1:], dropped)]
    return float((255 - np.mean(errors)) / 255)


def _largest(flow: npt.NDArray[np.float32], share: float) -> float:
    """Mean of the largest ``share`` of the flow's lengths."""
    lengths = np.linalg.norm(flow.astype(np.float64), axis=-1).ravel()
    count = int(lengths.size * share)
    return float(np.sort(lengths)[::-1][:count].mean())


def dynamic_degree(frames: Frames, flow: Flow, *, fps: float) -> float:
    """1 if enough pairs of frames move, 0 if not, at about 8 frames a second.

    A pair moves if the mean of the largest 5 % of its flow is above 6 pixels at a side of 256.

    Args:
        frames: ``[T, H, W, 3]``.
        flow: estimates motion.
        fps: frames a second of the clip.

    Raises:
        ValueError: fewer than two frames, or ``fps`` not above 0.
    """
    if len(frames) < 2:
        raise ValueError(f"dynamic degree needs at least 2 frames, got {len(frames)}")
    if not fps > 0:
        raise ValueError(f"fps must be above 0, got {fps}")
    frames = frames[:: max(1, round(fps / 8))]
    threshold = 6 * min(frames.shape[1:3]) / 256
    needed, moving = round(4 * len(frames) / 16), 0
    for a, b in pairwise(frames):
        moving += _largest(flow(a, b), 0.05) > threshold
        if moving >= needed:
            return 1.0
    return 0.0


def is_static(frames: Frames, flow: Flow) -> bool:
    """Whether a clip passes the filter of the standard suite before temporal flickering is measured.

    Looks at the largest 2 % of the flow of neighbouring frames, and of the first and last frame both ways.

    Args:
        frames: ``[T, H, W, 3]``.
        flow: estimates motion.

    Raises:
        ValueError: fewer than two frames.
    """
    if len(frames) < 2:
        raise ValueError(f"the static filter needs at least 2 frames, got {len(frames)}")
    threshold, allowed = 3 * min(frames.shape[1:3]) / 256, round(2 * len(frames) / 16)
    lengths = [_largest(flow(a, b), 0.02) for a, b in pairwise(frames)]
    if sum(length > threshold for length in lengths) > allowed:
        return False
    ends = [_largest(flow(a, b), 0.02) for a, b in ((frames[0], frames[-1]), (frames[-1], frames[0]))]
    return all(length <= threshold * allowed * 2 for length in ends)


def middle_frames(count: int, wanted: int) -> list[int]:
    """Indices of ``wanted`` frames: the middle of each of as many equal parts, the last repeated if there are fewer."""
    edges = np.linspace(0, count, min(wanted, count) + 1).astype(int)
    found = [(int(a) + int(b) - 1) // 2 for a, b in pairwise(edges)]
    return found + [found[-1]] * (wanted - len(found))
