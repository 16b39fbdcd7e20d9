"""The meaning of the block moments, in float32, one head at a time."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["block_moments_reference"]


def block_moments_reference(
    x: Tensor, block: int, table: Tensor | None, head: Tensor | None, rows: Tensor, key_valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and size of the blocks ``rows``; see :func:`dit_accel_kernels.stats.block_moments`."""
    batch, heads, tokens, dim = x.shape
    places = rows.long()[:, None] * block + torch.arange(block, device=x.device)  # [N, block]
    inside = places < tokens
    places = places.clamp(max=tokens - 1)
    seen = inside[None] if key_valid is None else inside & key_valid[:, places]
    size = seen.sum(2, dtype=torch.float32)
    count = size.clamp(min=1)[..., None]
    mean = x.new_empty((batch, heads, rows.shape[0], dim), dtype=torch.float32)
    variance = torch.empty_like(mean)
    for i_h in range(heads):
        token = places
        if table is not None and head is not None:
            token = table.index_select(0, head[i_h : i_h + 1])[0].long()[places]
        parts = x[:, i_h, token].float().masked_fill(~seen[..., None], 0)  # [B, N, block, D]
        mean[:, i_h] = parts.sum(2) / count
        off = (parts - mean[:, i_h, :, None]).masked_fill(~seen[..., None], 0)
        variance[:, i_h] = off.square().sum(2) / count
    return mean, variance, size
