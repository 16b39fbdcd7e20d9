"""Meeting a density: the parameter of a pattern whose computed blocks come nearest to it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from dit_accel.geometry import Grid
from dit_accel.order import extra_blocks
from dit_accel.pattern._registry import PatternContext

__all__ = ["computed_share", "extra_flags", "nearest", "one_axis_at_a_time", "share_weights"]


def extra_flags(ctx: PatternContext) -> tuple[Tensor, Tensor]:
    """Query blocks ``[Qb]`` and key blocks ``[Kb]`` with tokens that are not visual; they are computed whole."""
    natural = ctx.index is None
    return extra_blocks(ctx.geometry, natural, ctx.block_q), extra_blocks(ctx.geometry, natural, ctx.block_k)


def share_weights(tokens: int, block: int) -> Tensor:
    """Share of the tokens that each block holds, float32 ``[ceil(tokens / block)]``; the last may be ragged."""
    starts = torch.arange(0, tokens, block)
    return (tokens - starts).clamp(max=block).float() / tokens


def computed_share(ctx: PatternContext, levels: Tensor, rows: Tensor | None = None) -> float:
    """Share of the map that ``levels`` compute, by tokens, blocks of extra tokens included.

    Args:
        ctx: the pattern's context.
        levels: uint8 or bool ``[..., R, Kb]``, averaged over the leading dimensions.
        rows: query blocks that the ``R`` rows stand for; all of them if not given.
    """
    tokens = ctx.geometry.tokens
    extra_q, extra_k = extra_flags(ctx)
    weight_q, weight_k = share_weights(tokens, ctx.block_q), share_weights(tokens, ctx.block_k)
    if rows is not None:
        extra_q, weight_q = extra_q[rows], weight_q[rows]
    kept = (levels > 0) | extra_q[:, None] | extra_k
    by_row = kept.float().mean(tuple(range(kept.dim() - 2))) if kept.dim() > 2 else kept.float()
    return float((by_row @ weight_k @ weight_q) / weight_q.sum())


def nearest(count: int, share: Callable[[int], float], density: float) -> int:
    """Of ``count`` candidates that compute more and more, the one whose share is nearest to ``density`` by its ratio.

    Of several with the same share it is the last; density 1 is the last of all.
    """
    seen = lru_cache(maxsize=None)(share)
    low, high = 0, count - 1
    if density >= 1:
        return high
    while low < high:  # the last candidate within the density
        middle = (low + high + 1) // 2
        low, high = (middle, high) if seen(middle) <= density else (low, middle - 1)
    best = low
    for place in range(low + 1, count):  # the next larger one, and what computes no more than it
        if _distance(seen(place), density) > _distance(seen(best), density):
            break
        best = place
    return best


def one_axis_at_a_time(sizes: Sequence[Grid]) -> list[Grid]:
    """Sizes that grow on all axes at once, with the steps between them: first the width grows, then height, then frames."""
    found = dict.fromkeys(sizes[:1])
    for before, after in itertools.pairwise(sizes):
        found[before[0], before[1], after[2]] = None
        found[before[0], after[1], after[2]] = None
        found[after] = None
    return list(found)


def _distance(share: float, density: float) -> float:
    return abs(math.log(max(share, 1e-9) / density))
