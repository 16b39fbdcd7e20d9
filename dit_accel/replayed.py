"""Sparse calls of a plan as launches alone: what a call of the same layout has launched, with other addresses."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dit_accel.plan import Plan

__all__ = ["PlanReplays", "replays_of"]

_Three = tuple[Tensor, Tensor, Tensor]
_Result = tuple[Tensor, "Tensor | None"]
_Function = Callable[..., _Result]

_BACKENDS = frozenset(("hopper", "triton"))  # those whose kernels are all started by us
_EVERYWHERE = False  # whether tensors of any device are launched for; a test may say so


class PlanReplays:
    """What was launched for a plan; good as long as the plan is made of the same objects.

    The index lists of a plan, and what hangs on them, may be dropped and derived again, elsewhere: they are not kept alive
    here.
    """

    def __init__(self, plan: Plan) -> None:
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
        self.replays = Replays(stays, (plan.compensation, mask.block_q, mask.block_k, plan.gather is None))

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
            and self._compensation is plan.compensation
        )

    def __call__(self, function: _Function, moving: _Three, options: Hashable, *args: Any) -> _Result:
        """``function(*moving, *args)``, where ``options`` and the plan decide all that ``args`` do."""
        return self.replays(function, moving, (_layout(moving), options), *args)

    def again(self, plan: Plan, moving: _Three, options: Hashable) -> _Result | None:
        """What :meth:`__call__` returned for such tensors and options the last time it was asked, by launches alone.

        ``None`` if there was another call in between, or something has changed.
        """
        if type(moving[0]) is not Tensor or _recorded() or not self.holds(plan):
            return None
        return self.replays.again(moving, (_layout(moving), options))


def _layout(tensors: _Three) -> Hashable:
    query, key, value = tensors
    return (
        *(query.shape, query.stride(), query.dtype, key.shape, key.stride(), key.dtype),
        *(value.shape, value.stride(), value.dtype, query.device),
    )


@functools.lru_cache(maxsize=16)
def _bias(tokens: int, block: int, device: torch.device) -> Tensor:
    """Log of the keys of each block, float32 ``[1, 1, Kb]``, where all keys are valid: the same for all plans."""
    with torch.inference_mode(False):
        first = torch.arange(0, tokens, block, dtype=torch.int32, device=device)
        return (tokens - first).clamp(max=block).to(torch.float32).log()[None, None]


def _recorded() -> bool:
    """Whether somebody writes down what is computed."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def replays_of(plan: Plan, query: Tensor, backend: str | None) -> PlanReplays | None:
    """What may carry out a call of a plan in place of its Python, ``None`` if nothing may.

    Args:
        plan: in 16 bit, without a mask of keys, carried out as a whole.
        query: ``[B, H, S, D]``.
        backend: who is to compute it.
    """
    if backend not in _BACKENDS or not (query.is_cuda or _EVERYWHERE) or type(query) is not Tensor:
        return None
    if _recorded():
        return None
    if plan.compensation.pooled and plan.bias is None:
        if torch.cuda.is_current_stream_capturing():
            return None  # its memory would be the graph's, and nothing is in it yet
        plan.bias = _bias(plan.mask.k_len, plan.mask.block_k, query.device)
    known: PlanReplays | None = plan.replays
    if known is None or not known.holds(plan):
        known = plan.replays = PlanReplays(plan)
    return known
