"""The meaning of the pyramid, in float32."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .._common import blocks
from ..stats.reference import block_stats_reference

__all__ = ["pyramid_reference"]


def pyramid_reference(x: Tensor, levels: list[int], block: int, key_valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Means of each level and their bias; see :func:`dit_accel_kernels.pyramid`."""
    means, counts = [], []
    for level in levels:
        mean, _, count = block_stats_reference(x, level, key_valid)
        rest = blocks(x.shape[2], block) * (block // level) - mean.shape[2]
        means.append(F.pad(mean, (0, 0, 0, rest)))
        counts.append(F.pad(count, (0, rest)))
    return torch.cat(means, 2), torch.cat(counts, 1)[:, None].float().log()
