"""A fixed number of blocks: per row, per row with budgets by head, per head, or over all heads of a layer."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dit_accel.selection._ranked import budget, keep_ranked, with_best
from dit_accel.selection._registry import SELECTIONS, Forced, Rule

__all__ = ["EASY_RECALL", "adaptive_counts"]

#: AdaSpa's recall above which a head counts as easy (arXiv 2502.21079).
EASY_RECALL = 0.8


def _rule(levels: Callable[[float], Tensor], share: float | None, bound: Callable[[float], int]) -> Rule:
    """A rule whose strength is the density."""
    return Rule(levels, strength=share, is_density=True, bound=bound)


@SELECTIONS.register("top_k", by_head=True, rows_on_top=True, keeps_best="row")
def top_k(scores: Tensor, forced: Forced, share: float | None = None) -> Rule:
    """The best blocks of each row, as many in every row."""
    blocks, rows = scores.shape[-1], scores[..., 0].numel()
    return _rule(
        lambda density: keep_ranked(scores, budget(density, blocks)).to(torch.uint8),
        share,
        lambda density: rows * budget(density, blocks),
    )


def adaptive_counts(scores: Tensor, density: float) -> Tensor:
    """AdaSpa's budgets per head, int64 ``[B, H]``: easy heads give what hard heads get.

    With sparsity ``s = 1 - density``, ``n`` heads recall more than 0.8 of the mass; the ``n`` best
    get sparsity ``(1 + s) / 2``, the ``n`` worst ``(3 s - 1) / 2``, the others ``s`` (arXiv
    2502.21079). Where the paper is silent the mean is kept: ``n`` is cut to half of the heads, and
    the step ``(1 - s) / 2`` to what hard heads can still take.
    """
    blocks = scores.shape[-1]
    middle = budget(density, blocks)
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


@SELECTIONS.register("top_k_adaptive", paper="arXiv 2502.21079", rows_on_top=True)
def top_k_adaptive(scores: Tensor, forced: Forced, share: float | None = None) -> Rule:
    """The best blocks of each row, more of them in heads whose mass is spread (AdaSpa's head adaptivity)."""
    blocks, rows = scores.shape[-1], scores[..., 0].numel()
    return _rule(
        lambda density: keep_ranked(scores, adaptive_counts(scores, density)[..., None, None]).to(torch.uint8),
        share,
        lambda density: rows * budget(density, blocks),  # as many heads lie below it as above, by as much
    )


def _best_of(scores: Tensor, start: int, density: float) -> Tensor:
    flat = scores.flatten(start)
    return with_best(keep_ranked(flat, budget(density, flat.shape[-1])).view_as(scores), scores).to(torch.uint8)


@SELECTIONS.register("top_k_head", paper="arXiv 2506.23858", rows_on_top=True, keeps_best="head")
def top_k_head(scores: Tensor, forced: Forced, share: float | None = None) -> Rule:
    """The best blocks of each head, so that easy rows give to hard ones; at least one in each row."""
    size, rows = scores[0, 0].numel(), scores[..., 0].numel()
    heads = math.prod(scores.shape[:2])
    return _rule(
        lambda density: _best_of(scores, 2, density), share, lambda density: heads * budget(density, size) + rows
    )


@SELECTIONS.register("top_k_layer", rows_on_top=True, keeps_best="layer")
def top_k_layer(scores: Tensor, forced: Forced, share: float | None = None) -> Rule:
    """The best blocks over all heads of a layer, for scores that heads can be compared by; at least one in each row."""
    size, rows, batch = scores[0].numel(), scores[..., 0].numel(), scores.shape[0]
    return _rule(
        lambda density: _best_of(scores, 1, density), share, lambda density: batch * budget(density, size) + rows
    )
