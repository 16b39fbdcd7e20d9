"""The meaning of the token permutations, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..stats.reference import block_stats_reference

__all__ = ["permute_and_pool_reference", "permute_reference", "unpermute_reference"]


def _index(x: Tensor, table: Tensor, head: Tensor) -> Tensor:
    """int64 ``[B, H, S, D]`` view: the natural token at each position of block order."""
    return table[head.long()].long()[None, :, :, None].expand(x.shape)


def permute_reference(x: Tensor, table: Tensor, head: Tensor) -> Tensor:
    """Natural to block order; see :func:`dit_accel_kernels.permute_tokens`."""
    return x.gather(2, _index(x, table, head))


def unpermute_reference(x: Tensor, table: Tensor, head: Tensor) -> Tensor:
    """Block to natural order; see :func:`dit_accel_kernels.unpermute_tokens`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return out.scatter_(2, _index(x, table, head), x)


def permute_and_pool_reference(
    k: Tensor, v: Tensor, table: Tensor, head: Tensor, block: int, key_valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Permuted keys, values and their block means; see :func:`dit_accel_kernels.permute_and_pool`."""
    moved_k, moved_v = permute_reference(k, table, head), permute_reference(v, table, head)
    mean_k, _, count = block_stats_reference(moved_k, block, key_valid)
    mean_v, _, _ = block_stats_reference(moved_v, block, key_valid)
    return moved_k, moved_v, mean_k, mean_v, count
