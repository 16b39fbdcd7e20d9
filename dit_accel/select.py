"""Selection: from block scores to levels, on the device, without a host synchronisation.

Every rule takes scores ``[B, H, Qb, Kb]`` (larger is more important; a row of softmax mass sums to
one) and gives uint8 levels of the same shape, ``1`` for exact and ``0`` for skipped, with at least
one block in each row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["SELECTIONS", "Forced", "adaptive_counts", "select"]

#: AdaSpa's recall above which a head counts as easy (arXiv 2502.21079).
EASY_RECALL = 0.8


@dataclass(frozen=True)
class Forced:
    """Blocks that are exact whatever their score.

    Attributes:
        rows: bool ``[Qb]``, query blocks that see every key (text queries).
        cols: bool ``[Kb]``, key blocks that every query sees (text keys).
        row_count: number of true ``rows``, known on the host.
        col_count: number of true ``cols``, known on the host.
    """

    rows: Tensor
    cols: Tensor
    row_count: int
    col_count: int

    @classmethod
    def of(cls, rows: Tensor, cols: Tensor, device: torch.device) -> Forced:
        """Move host-side flags to ``device``, counting before the copy."""
        return cls(rows.to(device), cols.to(device), int(rows.sum()), int(cols.sum()))


def _budget(density: float, blocks: int) -> int:
    return min(max(round(density * blocks), 1), blocks)


def _keep_ranked(scores: Tensor, counts: Tensor | int) -> Tensor:
    """Keep the ``counts`` best of each row; ``counts`` broadcasts against ``[B, H, Qb, 1]``."""
    if isinstance(counts, int):  # indices of what is kept are far fewer than ranks of everything
        best = scores.topk(counts, dim=-1, sorted=False).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order)
    positions = torch.arange(scores.shape[-1], device=scores.device)
    rank.scatter_(-1, order, positions.expand_as(order))
    return rank < counts


def _top_k(scores: Tensor, density: float, forced: Forced) -> tuple[Tensor, int]:
    k = _budget(density, scores.shape[-1])
    return _keep_ranked(scores, k), scores[..., 0].numel() * k


def adaptive_counts(scores: Tensor, density: float) -> Tensor:
    """AdaSpa's budgets per head, int64 ``[B, H]``: easy heads give what hard heads get.

    With sparsity ``s = 1 - density``, ``n`` heads recall more than 0.8 of the mass; the ``n`` best
    get sparsity ``(1 + s) / 2``, the ``n`` worst ``(3 s - 1) / 2``, the others ``s`` (arXiv
    2502.21079). Where the paper is silent the mean is kept: ``n`` is cut to half of the heads, and
    the step ``(1 - s) / 2`` to what hard heads can still take.
    """
    blocks = scores.shape[-1]
    middle = _budget(density, blocks)
    more = min(middle + round(density / 2 * blocks), blocks, 2 * middle - 1)
    fewer = 2 * middle - more
    finite = scores.where(torch.isfinite(scores), 0)
    recall = finite.topk(middle, dim=-1).values.sum(-1).mean(-1)  # [B, H]
    heads = recall.shape[-1]
    easy = (recall > EASY_RECALL).sum(-1, keepdim=True).clamp(max=heads // 2)
    rank = recall.argsort(-1, descending=True).argsort(-1)
    counts = torch.full_like(rank, middle)
    counts = torch.where(rank < easy, fewer, counts)
    return torch.where(rank >= heads - easy, more, counts)


def _top_k_adaptive(scores: Tensor, density: float, forced: Forced) -> tuple[Tensor, int | None]:
    counts = adaptive_counts(scores, density)
    mean = _budget(density, scores.shape[-1])  # as many heads lie below it as above, by as much
    return _keep_ranked(scores, counts[..., None, None]), scores[..., 0].numel() * mean


def _top_k_head(scores: Tensor, density: float, forced: Forced) -> tuple[Tensor, int | None]:
    flat = scores.flatten(2)
    budget = _budget(density, flat.shape[-1])
    keep = _keep_ranked(flat, budget).view_as(scores)
    best = torch.zeros_like(keep).scatter_(-1, scores.argmax(-1, keepdim=True), True)
    return keep | best, flat[..., 0].numel() * (budget + scores.shape[2])


def _top_p(scores: Tensor, density: float, forced: Forced) -> tuple[Tensor, int | None]:
    order = scores.argsort(dim=-1, descending=True, stable=True)
    ranked = scores.gather(-1, order).clamp(min=0)
    ranked = ranked.where(torch.isfinite(ranked), 0)
    before = ranked.cumsum(-1) - ranked
    keep = before < density * ranked.sum(-1, keepdim=True)
    keep[..., 0] = True
    return torch.zeros_like(keep).scatter_(-1, order, keep), None


def _threshold(scores: Tensor, density: float, forced: Forced) -> tuple[Tensor, int | None]:
    best = torch.zeros_like(scores, dtype=torch.bool)
    best.scatter_(-1, scores.argmax(-1, keepdim=True), True)
    return (scores >= density) | best, None


def _all(scores: Tensor, density: float, forced: Forced) -> tuple[Tensor, int | None]:
    return torch.ones_like(scores, dtype=torch.bool), scores.numel()


_Rule = Callable[[Tensor, float, Forced], "tuple[Tensor, int | None]"]

#: Selection rules by name. A rule gives what it keeps and, if the host knows one, an upper bound of how many that is.
SELECTIONS: dict[str, _Rule] = {
    "top_k": _top_k,
    "top_k_adaptive": _top_k_adaptive,
    "top_k_head": _top_k_head,
    "top_p": _top_p,
    "threshold": _threshold,
    "all": _all,
}


def select(rule: str, scores: Tensor, density: float, forced: Forced) -> tuple[Tensor, int | None]:
    """Choose blocks.

    Forced columns take part of each row's budget; forced rows come on top.

    Args:
        rule: name in :data:`SELECTIONS`.
        scores: float32 ``[B, H, Qb, Kb]``. Values that are not finite count as the least.
        density: the rule's parameter, see :class:`dit_accel.Method`.
        forced: blocks that are exact whatever their score.

    Returns:
        uint8 levels ``[B, H, Qb, Kb]``, and an upper bound of the chosen blocks if the host knows one.
    """
    scores = torch.nan_to_num(scores, nan=0.0, posinf=0.0, neginf=0.0)
    favoured = scores.masked_fill(forced.cols, math.inf)
    keep, bound = SELECTIONS[rule](favoured if rule != "top_p" else scores, density, forced)
    keep = keep | forced.cols | forced.rows[:, None]
    if bound is not None:
        batch, heads, rows, cols = scores.shape
        bound = min(bound + batch * heads * (rows * forced.col_count + cols * forced.row_count), scores.numel())
    return keep.to(torch.uint8), bound
