"""Blocks by the error that their means would leave, with their mass from means of a few tokens: our own."""

from __future__ import annotations

from dit_accel.context import PlanContext
from dit_accel.geometry import TokenGeometry
from dit_accel.score._registry import SCORES, Scores
from dit_accel_kernels.fine_spread import fine_spread_scores

__all__: list[str] = []


def _cost(method: object, geometry: TokenGeometry, tokens: int = 8) -> float:
    q, k = getattr(method, "block_q", 64), getattr(method, "block_k", 64)
    return float(0.5 / tokens**2 + 1.0 / (q * k))


@SCORES.register("fine_spread", cost=_cost)
def fine_spread(ctx: PlanContext, tokens: int = 8) -> Scores:
    """Like ``spread``, but the mass of a block is that of the means of ``tokens`` queries and keys each.

    Where single tokens find single tokens, the mean of a block of keys says little of the mass in it. The map of finer
    means costs ``0.5 / tokens ** 2`` of dense attention a plan. See
    :func:`dit_accel_kernels.fine_spread.fine_spread_scores`.

    Raises:
        ValueError: the caller of the planner gave no values, or ``tokens`` does not divide the blocks.
    """
    if ctx.value is None:
        raise ValueError("this method looks at the values, and the caller of the planner gave none")
    fits = type(tokens) is int and tokens >= 1 and ctx.block_q % tokens == 0 and ctx.block_k % tokens == 0
    if not fits:
        raise ValueError(
            f"score 'fine_spread' needs tokens that divide blocks of {ctx.block_q} x {ctx.block_k}, got {tokens!r}"
        )
    found = fine_spread_scores(
        ctx.query,
        ctx.key,
        ctx.value,
        tokens=tokens,
        block_q=ctx.block_q,
        block_k=ctx.block_k,
        scale=ctx.scale,
        order=ctx.order,
        key_order=ctx.key_order,
        key_valid=ctx.key_valid,
    )
    ctx.spend(_cost(ctx.method, ctx.geometry, tokens))
    return Scores(found)
