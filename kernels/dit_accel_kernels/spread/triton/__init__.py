"""Expected errors in Triton: block moments of all candidate orders in one launch, then the map of errors in another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .moments import moments_triton
from .scores import scores_triton

__all__ = ["spread_scores_triton"]


def spread_scores_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
    orders: Sequence[Tensor | None],
    rows: Tensor | None,
    key_valid: Tensor | None,
) -> Tensor:
    """See :func:`dit_accel_kernels.spread.spread_scores`."""
    with torch.cuda.device_of(query):
        found = moments_triton(query, key, value, block_q, block_k, orders, rows, key_valid)
        return scores_triton(found, scale)
