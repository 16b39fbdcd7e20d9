"""The registry of compensations, and what one does."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from dit_accel._specs import Registry
from dit_accel_kernels.types import Pooled

if TYPE_CHECKING:
    from dit_accel.context import PlanContext
    from dit_accel.plan import Plan

__all__ = ["COMPENSATIONS", "Compensation", "SparseCall", "WorkSizes", "make_compensation"]


@dataclass(frozen=True, eq=False)
class SparseCall:
    """One sparse attention call, as a compensation sees it.

    Attributes:
        plan: what is computed.
        query: ``[B, H, S, D]`` in natural order.
        key: ``[B, H, S, D]`` in block order.
        value: like ``key``.
        key_valid: bool ``[B, S]`` in block order, or ``None``.
        scale: factor of the logits.
        pooled: the pooled remainder that the kernel took in, or ``None``.
    """

    plan: Plan
    query: Tensor
    key: Tensor
    value: Tensor
    key_valid: Tensor | None
    scale: float
    pooled: Pooled | None


class WorkSizes(NamedTuple):
    """What decides the work of a compensation besides the plan.

    Attributes:
        block_q: tokens in a query block.
        block_k: tokens in a key block.
        tokens: length of the sequence.
        dim: channels of a head.
    """

    block_q: int
    block_k: int
    tokens: int
    dim: int


class Compensation:
    """Base of all compensations; this one drops what is skipped.

    Attributes:
        pooled: whether each skipped block enters the softmax as one key, its mean, with ``+log(count)``.
        needs_lse: whether :meth:`finish` needs the log-sum-exp of the sparse call.
        separable: whether what :meth:`finish` returns stands for attention over the keys of the call, head by head, so that
            it can be joined with that of further keys and heads can be batch elements; as true of all that leave the
            output alone.
        needs_dense: whether :meth:`settle` needs the output of dense attention, so that plans are made on dense steps.
    """

    pooled: bool = False
    needs_lse: bool = False
    needs_dense: bool = False
    separable: bool = False

    def prepare(self, ctx: PlanContext, levels: Tensor) -> Any:
        """What to keep in the plan; called once when it is made, with levels uint8 ``[B, H, Qb, Kb]``."""
        return None

    def settle(self, ctx: PlanContext, plan: Plan) -> None:
        """Called when ``plan`` is complete, for what needs the sparse output; may set ``plan.state``."""

    def finish(self, call: SparseCall, out: Tensor, lse: Tensor | None) -> Tensor:
        """Correct the output ``[B, H, S, D]``, in natural order; ``lse`` float32 ``[B, H, S]`` if it was asked for."""
        return out

    def stays(self, plan: Plan) -> tuple[Tensor, ...]:
        """Tensors that :meth:`finish` uses in each call of a plan, beyond those of the plan itself."""
        return ()

    def work(self, ctx: PlanContext) -> float:
        """Work of a sparse call beyond blocks and pooled keys, as a share of dense attention."""
        return self.known_work(WorkSizes(ctx.block_q, ctx.block_k, *ctx.query.shape[2:]))

    def known_work(self, sizes: WorkSizes) -> float:
        """The part of :meth:`work` that sizes decide, known before a run."""
        return 0.0


COMPENSATIONS: Registry[Compensation] = Registry("compensate")


@lru_cache(maxsize=64)
def make_compensation(spec: str) -> Compensation:
    """The compensation that a spec names; it has no state of its own."""
    return COMPENSATIONS.create(spec)
