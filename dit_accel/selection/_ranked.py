"""Keeping the best of each row."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["budget", "keep_ranked", "with_best"]


def budget(density: float, blocks: int) -> int:
    """How many of ``blocks`` a density keeps, at least one."""
    return min(max(round(density * blocks), 1), blocks)


def keep_ranked(scores: Tensor, counts: Tensor | int) -> Tensor:
    """Keep the ``counts`` best of each row; ``counts`` broadcasts against ``[B, H, Qb, 1]``."""
    if isinstance(counts, int):  # indices of what is kept are far fewer than ranks of everything
        best = scores.topk(counts, dim=-1, sorted=False).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order)
    positions = torch.arange(scores.shape[-1], device=scores.device)
    rank.scatter_(-1, order, positions.expand_as(order))
    return rank < counts


def with_best(keep: Tensor, scores: Tensor) -> Tensor:
    """Add the best block of each row, so that no row is empty."""
    return keep.scatter(-1, scores.argmax(-1, keepdim=True), True)
