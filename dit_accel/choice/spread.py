"""Each head takes the order whose skipped blocks would leave the least error: our own."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.choice._registry import CHOICES, kept_blocks, sampled_count, sampled_rows
from dit_accel.context import PlanContext
from dit_accel.geometry import TokenGeometry
from dit_accel.score.spread import moments, spread_of

__all__ = ["order_error"]


def _cost(method: object, geometry: TokenGeometry, candidates: int) -> float:
    block = getattr(method, "block_q", 64)
    rows = sampled_count(-(-geometry.tokens // block))
    return float(candidates * rows / (geometry.tokens * getattr(method, "block_k", 64)))


def order_error(ctx: PlanContext, table: Tensor) -> Tensor:
    """Squared error that block statistics expect of the blocks that would be skipped, float32 ``[N, H]``.

    Looks at sampled rows of blocks; see :func:`dit_accel.score.spread.spread_of`.

    Raises:
        ValueError: the caller of the planner gave no values.
    """
    if ctx.value is None:
        raise ValueError("order_choice 'spread' looks at the values, and the caller of the planner gave none")
    rows = sampled_rows(ctx.q_blocks, table.device).long()
    kept = kept_blocks(ctx.density, ctx.k_blocks)
    places = rows[:, None] * ctx.block_q + torch.arange(ctx.block_q, device=table.device)
    places = places.flatten().clamp(max=ctx.query.shape[2] - 1)  # a ragged last block repeats its last token
    errors = torch.empty(table.shape[0], ctx.query.shape[1], device=table.device)
    for i, order in enumerate(table.long()):
        valid = None if ctx.key_valid is None else ctx.key_valid[:, order]
        for head in range(ctx.query.shape[1]):
            q = moments(ctx.query[:, head].index_select(1, order[places]), ctx.block_q)
            k = moments(ctx.key[:, head].index_select(1, order), ctx.block_k, valid)
            v = moments(ctx.value[:, head].index_select(1, order), ctx.block_k, valid)
            left = spread_of(q, k, v, ctx.scale).square().sort(dim=-1, descending=True).values[..., kept:]
            errors[i, head] = left.sum(-1).mean()
    ctx.spend(table.shape[0] * rows.shape[0] / (ctx.query.shape[2] * ctx.block_k))
    return errors


@CHOICES.register("spread", cost=_cost, scores=order_error)
def spread(ctx: PlanContext, table: Tensor) -> Tensor:
    """The candidate whose skipped blocks would leave the least error by block statistics; needs no dense step."""
    return order_error(ctx, table).nan_to_num(nan=torch.inf).argmin(0)
