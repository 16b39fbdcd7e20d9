"""LPIPS and shift-tolerant LPIPS of clips, frame by frame."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel_eval.extractors import cache

__all__ = ["MIN_SIDE", "distance", "missing"]

#: AlexNet's pooling leaves nothing of a smaller frame.
MIN_SIDE = 32
_BATCH = 8


def missing(extractor: str) -> str | None:
    """Why the network cannot be used here, ``None`` if it can."""
    return cache.missing(extractor)


def distance(extractor: str, a: Tensor, b: Tensor, *, rescale: bool = True, spatial: bool = False) -> float:
    """Mean over frames of the distance of each.

    Args:
        extractor: ``lpips-alex``, ``lpips-vgg``, ``st-lpips-alex`` or ``st-lpips-vgg``.
        a: ``[T, H, W, 3]`` in [0, 1].
        b: like ``a``.
        rescale: map to [-1, 1], which the networks were fitted on; without it, as Sparse VideoGen measures.
        spatial: enlarge each stage's map to the frame before the mean, as TeaCache measures.
    """
    from dit_accel_eval.extractors.lpips import load

    net = load(extractor, str(a.device))
    values = []
    # TF32 would show in the third digit.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for x, y in zip(a.split(_BATCH), b.split(_BATCH)):
            x, y = x.permute(0, 3, 1, 2), y.permute(0, 3, 1, 2)
            values.append(net(x * 2 - 1, y * 2 - 1, spatial=spatial) if rescale else net(x, y, spatial=spatial))
    return float(torch.cat(values).double().mean())
