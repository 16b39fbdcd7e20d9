"""Each head takes the order whose skipped blocks would leave the least error: our own."""

from __future__ import annotations

from torch import Tensor

from dit_accel.choice._registry import CHOICES, kept_blocks, sampled_count, sampled_rows
from dit_accel.context import PlanContext
from dit_accel.geometry import TokenGeometry
from dit_accel.score.spread import expected_errors

__all__ = ["order_error"]


def _cost(method: object, geometry: TokenGeometry, candidates: int) -> float:
    block = getattr(method, "block_q", 64)
    rows = sampled_count(-(-geometry.tokens // block))
    return float(candidates * rows / (geometry.tokens * getattr(method, "block_k", 64)))


def order_error(ctx: PlanContext, table: Tensor) -> Tensor:
    """Squared error that block statistics expect of the blocks that would be skipped, float32 ``[N, H]``.

    Looks at sampled rows of blocks; see :func:`dit_accel.score.spread.expected_errors`.

    Raises:
        ValueError: the caller of the planner gave no values.
    """
    rows = sampled_rows(ctx.q_blocks, table.device)
    errors = expected_errors(ctx, table, rows, kept_blocks(ctx.density, ctx.k_blocks))
    ctx.spend(table.shape[0] * rows.shape[0] / (ctx.query.shape[2] * ctx.block_k))
    return errors


@CHOICES.register("spread", cost=_cost, scores=order_error)
def spread(ctx: PlanContext, table: Tensor) -> Tensor:
    """The candidate whose skipped blocks would leave the least error by block statistics; needs no dense step."""
    return order_error(ctx, table).argmin(0)
