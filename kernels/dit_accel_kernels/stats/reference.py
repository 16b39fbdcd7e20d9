"""The meaning of the block statistics, in float32."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .._common import blocks

__all__ = ["block_stats_reference"]


def block_stats_reference(x: Tensor, block: int, key_valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, absolute maximum and count per block; see :func:`dit_accel_kernels.block_stats`."""
    batch, heads, tokens, dim = x.shape
    count = blocks(tokens, block)
    pad = count * block - tokens
    wide = x.float()
    valid = torch.ones(1, tokens, dtype=torch.bool, device=x.device) if key_valid is None else key_valid
    wide = wide.masked_fill(~valid[:, None, :, None], 0.0)
    wide = F.pad(wide, (0, 0, 0, pad)).view(batch, heads, count, block, dim)
    counts = F.pad(valid.int(), (0, pad)).view(-1, count, block).sum(2, dtype=torch.int32)
    mean = wide.sum(3) / counts.clamp(min=1)[:, None, :, None]
    return mean.to(x.dtype), wide.abs().amax(3), counts
