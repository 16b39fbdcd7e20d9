"""Profile ``offline``: VBench's formulas with extractors that packages carry. The numbers are not VBench's."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from dit_accel_eval.extractors import brisque, cache, efficientnet, flow, rife
from dit_accel_eval.vbench.formulas import Flow, Frames, Interpolate
from dit_accel_eval.vbench.pictures import to_planes
from dit_accel_eval.vbench.slots import Slot, absent

__all__ = ["SLOTS"]

_BATCH = 16


def _features(device: str) -> Callable[[Frames], Tensor]:
    import torch

    net = efficientnet.load(device)

    def encode(frames: Frames) -> Tensor:
        with torch.inference_mode():
            return torch.cat([net(part) for part in to_planes(frames, device).split(_BATCH)])

    return encode


def _middle(device: str) -> Interpolate:
    rife.load(device)
    return lambda a, b: rife.middle(a, b, device)


def _flow(device: str) -> Flow:
    return flow.opencv_flow


def _quality(device: str) -> Callable[[Frames], float]:
    """BRISQUE turned round: 100 for the best picture, 0 for the worst, as MUSIQ counts."""

    def assess(frames: Frames) -> float:
        return float(np.mean([100 - min(max(brisque.score(frame), 0.0), 100.0) for frame in frames]))

    return assess


_LITE0 = Slot(efficientnet.NAME, _features, lambda: cache.missing(efficientnet.NAME))

#: Extractor of each dimension that needs one.
SLOTS: dict[str, Slot] = {
    "subject_consistency": _LITE0,
    "background_consistency": _LITE0,
    "motion_smoothness": Slot(rife.NAME, _middle, lambda: cache.missing(rife.NAME)),
    "dynamic_degree": Slot(flow.NAME, _flow, flow.missing),
    "aesthetic_quality": absent("aesthetic quality", "CLIP ViT-L/14 and LAION's head"),
    "imaging_quality": Slot(brisque.NAME, _quality, brisque.missing),
    "overall_consistency": absent("overall consistency", "ViCLIP"),
}
