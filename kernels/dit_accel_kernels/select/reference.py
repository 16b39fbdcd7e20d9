"""The meaning of the selection of the best blocks, by sorting."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["keep_best_reference", "unkept_energy_reference"]


def keep_best_reference(scores: Tensor, count: int, by_head: bool, rows: Tensor | None, cols: Tensor | None) -> Tensor:
    """See :func:`dit_accel_kernels.select.keep_best`."""
    scores = torch.nan_to_num(scores, nan=0.0, posinf=0.0, neginf=0.0)
    if cols is not None:
        scores = scores.masked_fill(cols, math.inf)
    groups = scores.flatten(2) if by_head else scores
    best = groups.topk(count, dim=-1, sorted=False).indices
    keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True).view_as(scores)
    if by_head:
        keep = keep.scatter_(-1, scores.argmax(-1, keepdim=True), True)
    for whole in (None if rows is None else rows[:, None], cols):
        if whole is not None:
            keep = keep.masked_fill_(whole, True)
    return keep.to(torch.uint8)


def unkept_energy_reference(scores: Tensor, count: int) -> Tensor:
    """See :func:`dit_accel_kernels.select.unkept_energy`."""
    finite = torch.nan_to_num(scores, nan=0.0, posinf=0.0, neginf=0.0)
    return finite.square().sort(dim=-1, descending=True).values[..., count:].sum(-1)
