"""The difference between full and sparse attention, kept from a dense step (DiTFastAttn, arXiv 2406.08552)."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakSet

from torch import Tensor

from dit_accel._specs import parse_spec
from dit_accel.compensate._registry import COMPENSATIONS, Compensation, SparseCall, WorkSizes
from dit_accel.compensate.first_order import FirstOrder
from dit_accel.context import PlanContext
from dit_accel_kernels import dense_attention

if TYPE_CHECKING:
    from dit_accel.plan import Plan


#: Bytes of all residuals that are kept at once. FLUX has 28 MB a layer at 1024 x 1024, 406 MB at 4096 x 4096.
RESIDUAL_BYTES = 2 << 30
_keep: WeakSet[Plan] = WeakSet()


class _Residual(Compensation):
    """``O_t = sparse_t + (full - sparse)`` with the bracket from the step at which the plan was made.

    Holds one tensor of the size of the output for each layer and guidance branch. Where the base puts something in the
    place of skipped blocks too, layers beyond a limit of memory do with that, and the status says so.

    Args:
        base: what becomes of skipped blocks in ``sparse``.
    """

    needs_dense = True

    def __init__(self, base: Compensation) -> None:
        self._base = base
        self.pooled, self.needs_lse = base.pooled, base.needs_lse

    def stays(self, plan: Plan) -> tuple[Tensor, ...]:
        """Those of the base, and the bracket."""
        return (*self._base.stays(plan), *(() if plan.state is None else (plan.state,)))

    def known_work(self, sizes: WorkSizes) -> float:
        """That of the base."""
        return self._base.known_work(sizes)

    def settle(self, ctx: PlanContext, plan: Plan) -> None:
        from dit_accel.plan import execute

        size = ctx.query.numel() * ctx.query.element_size()
        if self.pooled and size + sum(plan.state.nbytes for plan in _keep if plan.state is not None) > RESIDUAL_BYTES:
            ctx.notes.append(f"residuals of more than {RESIDUAL_BYTES >> 20} MiB in all are not kept")
            return
        if ctx.dense_out is None:
            assert ctx.value is not None
            full = dense_attention(ctx.query, ctx.key, ctx.value, scale=ctx.scale, key_valid=ctx.key_valid)[0]
            ctx.spend(1.0)
        else:
            full = ctx.dense_out
        assert ctx.value is not None
        plan.state = None
        sparse = execute(plan, ctx.query, ctx.key, ctx.value, scale=ctx.scale, key_valid=ctx.key_valid, backend=None)
        ctx.spend((ctx.density or 0.0) + plan.pooled_density)
        plan.state, plan.replays = full - sparse, None  # what was launched without it is not what follows
        _keep.add(plan)

    def finish(self, call: SparseCall, out: Tensor, lse: Tensor | None) -> Tensor:
        """What the base makes of the output, and the bracket."""
        state: Tensor | None = call.plan.state
        if isinstance(self._base, FirstOrder):
            return self._base.finish_with(call, out, lse, state)
        out = self._base.finish(call, out, lse)
        return out if state is None else out + state


@COMPENSATIONS.register("residual", paper="arXiv 2406.08552")
def residual(base: str = "drop", *values: int) -> Compensation:
    """What the sparse output lacked at the last dense step is added at those that follow.

    Args:
        base: another compensation, which the sparse output has besides, such as ``"query_mean"``.
        values: values of that.

    Raises:
        ValueError: ``base`` is unknown, or keeps something in the plan itself.
    """
    found = COMPENSATIONS.entry(base).factory(*values)
    own = [getattr(type(found), name) is getattr(Compensation, name) for name in ("prepare", "settle", "work")]
    if not all(own):
        raise ValueError(
            f"the base of a residual must keep nothing in the plan, as 'mean' and 'query_mean', got {base!r}"
        )
    return _Residual(found)


def without_residual(compensate: str) -> str:
    """The spec of the base of a residual; any other spec as it is."""
    spec = parse_spec(compensate)
    if spec.name != "residual":
        return compensate
    base, *values = spec.args or ("drop",)
    return f"{base}:{','.join(map(str, values))}" if values else str(base)
