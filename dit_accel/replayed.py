"""Sparse calls of a plan as launches alone: what a call of the same layout has launched, with other addresses."""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dit_accel.plan import Plan
    from dit_accel_kernels.replay import Launches

__all__ = ["VARIABLE", "PlanReplays", "recorded", "replays_of", "switched_off"]

#: Environment variable that keeps launches from being made again.
VARIABLE = "DIT_ACCEL_REPLAY"

_Tensors = tuple[Tensor, ...]
_Result = tuple[Tensor, "Tensor | None"]
_Function = Callable[..., _Result]

_BACKENDS = frozenset(("hopper", "triton"))  # those whose kernels are all started by us
_EVERYWHERE = False  # whether tensors of any device are launched for; a test may say so


class PlanReplays:
    """What was launched for a plan; good as long as the plan is made of the same objects.

    The index lists of a plan, and what hangs on them, may be dropped and derived again, elsewhere: they are not kept alive
    here.

    Args:
        plan: that plan.
        more: further tensors that live as long as its index lists.
    """

    def __init__(self, plan: Plan, more: tuple[Tensor | None, ...] = ()) -> None:
        from dit_accel_kernels.replay import Replays  # not before it is used: importing dit_accel must be quick

        lists, mask, order, key_order, windows = plan.mask.lists(), plan.mask, plan.order, plan.key_order, plan.windows
        self._lists, self._bits = weakref.ref(lists), mask.bits
        self._order, self._key_order, self._windows = order, key_order, windows
        self._bias, self._seen_bits, self._gather = plan.bias, plan.seen_bits, plan.gather
        self._compensation = plan.compensation
        stays: list[Tensor | None] = [lists.row_start, lists.full, lists.partial, lists.indices, mask.bits]
        stays += [plan.seen_bits, plan.bias, *plan.compensation.stays(plan)]
        stays += [x for o in (order, key_order) for x in ((None, None) if o is None else (o.table, o.head))]
        stays += [None] * 3 if windows is None else [windows.q_lo, windows.q_hi, windows.k_code]
        stays += more
        self._precision = plan.precision
        key = plan.compensation, mask.block_q, mask.block_k, plan.gather is None, plan.precision
        self.replays = Replays(stays, key)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # the copy of a plan has launched nothing yet

    def holds(self, plan: Plan) -> bool:
        """Whether the plan is still made of the same objects."""
        return (
            self._lists() is plan.mask.lists()
            and self._bits is plan.mask.bits
            and self._order is plan.order
            and self._key_order is plan.key_order
            and self._bias is plan.bias
            and self._seen_bits is plan.seen_bits
            and self._windows is plan.windows
            and self._gather is plan.gather
            and self._precision is plan.precision
            and self._compensation is plan.compensation
        )

    @staticmethod
    def used(plan: Plan) -> tuple[object, ...]:
        """What holds the tensors of a plan whose addresses are known here."""
        mask, more = plan.mask, (plan.compensation, plan.state, plan.windows, plan.bias, plan.seen_bits)
        return plan, mask.lists(), mask.bits, plan.order, plan.key_order, *more

    def __call__(self, function: _Function, moving: _Tensors, options: Hashable, *args: Any) -> _Result:
        """``function(*moving, *args)``, where ``options`` and the plan decide all that ``args`` do."""
        return self.replays(function, moving, (_layout(moving), options), *args)

    def again(self, plan: Plan, moving: _Tensors, options: Hashable) -> _Result | None:
        """What :meth:`__call__` returned for such tensors and options the last time it was asked, by launches alone.

        ``None`` if there was another call in between, or something has changed.
        """
        if type(moving[0]) is not Tensor or recorded() or not self.holds(plan):
            return None
        return self.replays.again(moving, (_layout(moving), options))

    def latest(self, moving: _Tensors, options: Hashable) -> Launches | None:
        """What the call before has launched, if it was for such tensors and options."""
        return self.replays.latest((_layout(moving), options))


def _layout(tensors: _Tensors) -> Hashable:
    query, key, value, *rest = tensors
    found = (
        *(query.shape, query.stride(), query.dtype, key.shape, key.stride(), key.dtype),
        *(value.shape, value.stride(), value.dtype, query.device),
    )
    return found if not rest else (*found, *[part for x in rest for part in (x.shape, x.stride(), x.dtype)])


@functools.lru_cache(maxsize=16)
def _bias(tokens: int, block: int, device: torch.device) -> Tensor:
    """Log of the keys of each block, float32 ``[1, 1, Kb]``, where all keys are valid: the same for all plans."""
    with torch.inference_mode(False):
        first = torch.arange(0, tokens, block, dtype=torch.int32, device=device)
        return (tokens - first).clamp(max=block).to(torch.float32).log()[None, None]


def recorded() -> bool:
    """Whether somebody writes down what is computed."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def switched_off() -> bool:
    """Whether ``DIT_ACCEL_REPLAY`` says ``off``, ``0``, ``false`` or ``no``."""
    return os.environ.get(VARIABLE, "").strip().lower() in ("off", "0", "false", "no")


def replays_of(plan: Plan, query: Tensor, backend: str | None) -> PlanReplays | None:
    """What may carry out a call of a plan in place of its Python, ``None`` if nothing may.

    Plans that nothing was recorded for yet ask :data:`VARIABLE`.

    Args:
        plan: one that is carried out as a whole.
        query: ``[B, H, S, D]``.
        backend: who is to compute it.
    """
    if backend not in _BACKENDS or not (query.is_cuda or _EVERYWHERE) or type(query) is not Tensor:
        return None
    if recorded():
        return None
    if plan.compensation.pooled and plan.bias is None:
        if torch.cuda.is_current_stream_capturing():
            return None  # its memory would be the graph's, and nothing is in it yet
        plan.bias = _bias(plan.mask.k_len, plan.mask.block_k, query.device)
    known: PlanReplays | None = plan.replays
    if known is None or not known.holds(plan):
        if switched_off():
            plan.replays = None
            return None
        known = plan.replays = PlanReplays(plan, (_order_of_jobs(plan, query, backend),))
    return known


def _order_of_jobs(plan: Plan, query: Tensor, backend: str | None) -> Tensor | None:
    """The order in which Hopper's kernel does the blocks of such queries ``[B, H, S, D]``, made once for the lists."""
    if backend != "hopper" or plan.precision is not None:
        return None
    from dit_accel_kernels.block_sparse.hopper_kept import order_that_stays

    return order_that_stays(query, plan.mask.lists())
