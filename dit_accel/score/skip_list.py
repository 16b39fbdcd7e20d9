"""A list of skipped blocks that only grows (LiteAttention, arXiv 2511.11062)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dit_accel._specs import parse_spec
from dit_accel.context import PlanContext
from dit_accel.score._blocks import row_reductions, whole_blocks
from dit_accel.score._registry import SCORES, Scores
from dit_accel.selection import select

_LOWEST = -100.0
_SKIPPED = -101.0
_KEY = "skip_list"


@SCORES.register("skip_list", paper="arXiv 2511.11062", cost=0.5)
def skip_list(ctx: PlanContext) -> Scores:
    """Largest distance of a block's logits from the running maximum of its queries, natural logarithm.

    Key blocks come in block order. With ``m_rj`` the largest logit of query ``r`` in block ``j`` and ``M_rj`` the largest
    in the blocks up to ``j`` that are not on the list, the score is ``max_r (m_rj - M_rj) <= 0``, and blocks below the
    threshold (selection ``threshold:-10``) go on the list. A block on the list stays there until the run ends: what it
    holds has no effect any more.

    Blocks in which some query reaches its running maximum all have the value 0 in the paper and are kept by every
    threshold. Here they are ranked by the mean of ``exp(m_rj - M_rj)``, above 0, so that lower densities can be asked for.
    With a density, the list grows to it and then stays.

    In the paper the maxima come for free, inside the attention kernel; here they take ``Q K^T`` once more for each plan.

    Raises:
        ValueError: if the density rises during a run, or the threshold is -100 or lower: the list would shrink.
    """
    spec = parse_spec(ctx.method.select)
    least = spec.args[0] if spec.name == "threshold" and spec.args else None
    if isinstance(least, int | float) and least <= _LOWEST:
        raise ValueError(f"the threshold of a skip list must be above {_LOWEST:g}, got {least}")
    known = ctx.memory.get(_KEY)
    skipped, density = known if known is not None else (None, None)
    if skipped is not None and density is not None and (ctx.density is None or ctx.density > density):
        raise ValueError(f"a skip list only grows: the density was {density} and must not rise, got {ctx.density}")
    values = _distances(ctx, skipped)
    levels, _ = select(ctx.method.select, values, ctx.density, ctx.forced)
    ctx.memory[_KEY] = (levels == 0, ctx.density)
    ctx.spend(0.5)
    return Scores(values)


def _distances(ctx: PlanContext, skipped: Tensor | None) -> Tensor:
    cols, seen = whole_blocks(ctx.keys, ctx.block_k, ctx.valid)
    found = []
    size = ctx.block_q
    for blocks, _, top, _ in row_reductions(
        ctx.queries, cols, seen, block_q=size, block_k=ctx.block_k, scale=ctx.scale
    ):
        if skipped is not None:
            top = top.masked_fill(skipped[:, :, blocks].repeat_interleave(size, 2)[:, :, : top.shape[2]], -torch.inf)
        gap = (top - top.cummax(-1).values).masked_fill(top == -torch.inf, -torch.inf)
        gap = F.pad(gap, (0, 0, 0, -gap.shape[2] % size), value=-torch.inf).unflatten(2, (-1, size))
        largest = gap.amax(3)
        found.append(torch.where(largest < 0, largest.clamp(min=_LOWEST), gap.exp().mean(3)))
    values = torch.cat(found, 2)
    return values if skipped is None else values.masked_fill(skipped, _SKIPPED)
