"""Blocks by the error that their means would leave, from block statistics alone: our own."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.context import PlanContext
from dit_accel.geometry import TokenGeometry
from dit_accel.score._registry import SCORES, Scores
from dit_accel_kernels.select import unkept_energy
from dit_accel_kernels.spread import spread_scores

__all__ = ["expected_errors"]

_BYTES = 1 << 28  # of block statistics that are held at once


def expected_errors(ctx: PlanContext, table: Tensor, rows: Tensor, kept: int) -> Tensor:
    """Squared error that block statistics expect of blocks that would be skipped, float32 ``[N, H]``.

    Args:
        ctx: queries, keys and values in natural order.
        table: candidate orders, int32 ``[N, S]``.
        rows: blocks of queries to look at.
        kept: blocks that each of them keeps.

    Raises:
        ValueError: the caller of the planner gave no values.
    """
    if ctx.value is None:
        raise ValueError("order_choice 'spread' looks at the values, and the caller of the planner gave none")
    batch, heads, _, dim = ctx.key.shape
    together = max(1, _BYTES // (10 * batch * heads * ctx.k_blocks * dim))  # ten bytes for each channel of a block
    errors = []
    for some in table.split(together):
        found = spread_scores(
            ctx.query,
            ctx.key,
            ctx.value,
            block_q=ctx.block_q,
            block_k=ctx.block_k,
            scale=ctx.scale,
            candidates=some,
            rows=rows,
            key_valid=ctx.key_valid,
        )
        errors.append(unkept_energy(found, kept).mean((1, 3)))
    return errors[0] if len(errors) == 1 else torch.cat(errors)


def _cost(method: object, geometry: TokenGeometry) -> float:
    q, k = getattr(method, "block_q", 64), getattr(method, "block_k", 64)
    return float(1.0 / (q * k))


@SCORES.register("spread", cost=_cost)
def spread(ctx: PlanContext) -> Scores:
    """Mass of block means times the spread of logits and values within the block: error, not mass.

    It needs no dense step, so that plans can be made at any step; products of block statistics are all it costs. See
    :func:`dit_accel_kernels.spread.spread_scores`.

    Raises:
        ValueError: the caller of the planner gave no values.
    """
    if ctx.value is None:
        raise ValueError("this method looks at the values, and the caller of the planner gave none")
    found = spread_scores(
        ctx.query,
        ctx.key,
        ctx.value,
        block_q=ctx.block_q,
        block_k=ctx.block_k,
        scale=ctx.scale,
        order=ctx.order,
        key_order=ctx.key_order,
        key_valid=ctx.key_valid,
    )
    ctx.spend(1.0 / (ctx.block_q * ctx.block_k))
    return Scores(found[0])
