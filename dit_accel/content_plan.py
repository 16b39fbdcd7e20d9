"""Plans of a whole batch at once where tokens are ordered by what they hold, and so differently in each batch element.

Rules that treat every head apart from the others do not mind whose head it is: the batch elements become further heads of
one, and what is found is cut up again. A loop over a batch of 16 would launch 16 times as many small kernels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dit_accel.compensate import Compensation, make_compensation
from dit_accel.content import CONTENT_ORDERS, ContentOrder
from dit_accel.context import PlanContext
from dit_accel.mask import BlockMask
from dit_accel.method import Method
from dit_accel.plan import Plan
from dit_accel.score import SCORES, block_scores
from dit_accel.selection import SELECTIONS, Forced, select
from dit_accel_kernels.types import BlockLists, TokenOrder

__all__ = ["plan_together", "plans_together"]

#: Where the folded batch keeps what its rules remember.
MEMORY = "batch"


def plans_together(method: Method) -> bool:
    """Whether the batch elements of a method with a content order can be planned as further heads of one."""
    compensation = type(make_compensation(method.compensate))
    idle = all(getattr(compensation, name) is getattr(Compensation, name) for name in ("prepare", "work", "settle"))
    slots = ((CONTENT_ORDERS, method.order[0]), (SCORES, method.score), (SELECTIONS, method.select))
    return idle and not method.has_levels and all(bool(known.trait(spec, "by_head", False)) for known, spec in slots)


def plan_together(ctx: PlanContext, spec: str, forced_blocks: Callable[[bool, bool], Forced]) -> Plan:
    """One plan for each batch element, made at once.

    Args:
        ctx: the whole batch, without a key mask.
        spec: the content order.
        forced_blocks: forced blocks for orders that move queries or keys or leave them.
    """
    method, (batch, heads) = ctx.method, ctx.query.shape[:2]
    memory = ctx.memory.setdefault(MEMORY, {})
    folded: dict[str, Any] = {name: _fold(getattr(ctx, name)) for name in ("query", "key", "lse")}
    one = dataclasses.replace(ctx, **folded, value=None, dense_out=None, memory=memory, cost=0.0)
    found: ContentOrder = CONTENT_ORDERS.create(spec, one)
    forced = forced_blocks(found.query is not None, found.key is not None)
    one = dataclasses.replace(one, order=found.query, key_order=found.key, forced=forced)
    scores = block_scores(one)
    levels, _ = select(method.select, scores.values, ctx.density, forced, insist=scores.insist, parts=batch)
    ctx.spend(one.cost)
    levels = levels.view(batch, heads, *levels.shape[2:])
    mask = BlockMask.from_levels(levels, ctx.query.shape[2], ctx.key.shape[2], method.block_q, method.block_k)
    density, compensation = mask.density(), make_compensation(method.compensate)
    parts = tuple(
        Plan(
            mask=_element(mask, i),
            order=_heads(found.query, i, heads),
            key_order=_heads(found.key, i, heads),
            order_names=(spec,),
            windows=None,
            compensation=compensation,
            density=density[i : i + 1],
            cost=ctx.cost,
            precision=method.precision_rule.fixed,
        )
        for i in range(batch)
    )
    return dataclasses.replace(parts[0], density=density, finite=torch.isfinite(scores.values).all(), parts=parts)


def _fold(x: Tensor | None) -> Tensor | None:
    """``[B, H, ...]`` to ``[1, B * H, ...]``."""
    return None if x is None else x.flatten(0, 1)[None]


def _heads(order: TokenOrder | None, element: int, heads: int) -> TokenOrder | None:
    """The orders of one batch element's heads; a content order has a row for each head."""
    if order is None:
        return None
    return TokenOrder(order.table[element * heads : (element + 1) * heads], order.head[:heads])


def _element(mask: BlockMask, i: int) -> BlockMask:
    """The mask of one batch element, its lists cut from those of the batch, of which every row owns as many entries."""
    lists, one = mask.lists(), slice(i, i + 1)
    size = lists.indices.shape[0] // mask.bits.shape[0]
    partial = None if lists.partial is None else lists.partial[one]
    indices = lists.indices[i * size : (i + 1) * size]
    cut = BlockLists(lists.row_start[:1], lists.full[one], partial, indices, lists.block_q, lists.block_k)
    return dataclasses.replace(mask, bits=mask.bits[one], _lists=cut)
