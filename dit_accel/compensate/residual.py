"""The difference between full and sparse attention, kept from a dense step (DiTFastAttn, arXiv 2406.08552)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from dit_accel.compensate._registry import COMPENSATIONS, Compensation, SparseCall
from dit_accel.context import PlanContext
from dit_accel_kernels import dense_attention

if TYPE_CHECKING:
    from dit_accel.plan import Plan


class _Residual(Compensation):
    """``O_t = sparse_t + (full - sparse)`` with the bracket from the step at which the plan was made.

    Holds one tensor of the size of the output for each layer and guidance branch.
    """

    needs_dense = True

    def settle(self, ctx: PlanContext, plan: Plan) -> None:
        from dit_accel.plan import execute

        if ctx.dense_out is None:
            assert ctx.value is not None
            full = dense_attention(ctx.query, ctx.key, ctx.value, scale=ctx.scale, key_valid=ctx.key_valid)[0]
            ctx.spend(1.0)
        else:
            full = ctx.dense_out
        assert ctx.value is not None
        plan.state = None
        sparse = execute(plan, ctx.query, ctx.key, ctx.value, scale=ctx.scale, key_valid=ctx.key_valid, backend=None)
        ctx.spend(ctx.density or 0.0)
        plan.state = full - sparse

    def finish(self, call: SparseCall, out: Tensor, lse: Tensor | None) -> Tensor:
        state: Tensor | None = call.plan.state
        return out if state is None else out + state


@COMPENSATIONS.register("residual", paper="arXiv 2406.08552")
def residual() -> Compensation:
    """What the sparse output lacked at the last dense step is added at those that follow."""
    return _Residual()
