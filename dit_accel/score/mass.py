"""Exact softmax mass, from the log-sum-exp of a dense step (AdaSpa, arXiv 2502.21079)."""

from __future__ import annotations

from dit_accel.context import PlanContext
from dit_accel.score._registry import SCORES, Scores
from dit_accel_kernels import block_mass


@SCORES.register("mass", paper="arXiv 2502.21079", needs_lse=True, cost=0.5)
def mass(ctx: PlanContext) -> Scores:
    """Exact softmax mass of each block, ``Q K^T`` once more with a log-sum-exp from a dense step.

    Raises:
        ValueError: without a log-sum-exp.
    """
    if ctx.lse is None:
        raise ValueError("block mass needs the log-sum-exp of a dense step, got None")
    ctx.spend(0.5)
    found = block_mass(
        ctx.query,
        ctx.keys,
        ctx.lse,
        block_q=ctx.block_q,
        block_k=ctx.block_k,
        scale=ctx.scale,
        order=ctx.order,
        key_valid=ctx.valid,
    )
    return Scores(found, is_mass=True)
