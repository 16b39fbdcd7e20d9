"""Sparse calls that nothing is left to decide about: same layer, plan, layout and launches as at the step before.

Whoever asks gets ``None`` as soon as anything could be otherwise than it was, and then the call goes the usual way. What is
asked at each call is what can change between two steps: the schedule, the plan, who watches, the layout of the tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dit_accel.policy import Action
from dit_accel.replayed import recorded

if TYPE_CHECKING:
    from dit_accel.layer_state import LayerState
    from dit_accel.plan import Plan
    from dit_accel.planned_run import Call
    from dit_accel.runtime import ModelRun
    from dit_accel_kernels.replay import Launches

__all__ = ["Settled", "settled"]


class Settled:
    """One layer's sparse call as it was made last, for one guidance branch; made by :func:`settled`.

    Args:
        state: what the layer remembers; its plan is carried out.
        plan: that plan.
        given: query, key and value ``[B, S, H, D]``.
        scale: what was given as factor of the logits.
        launches: what the call has launched.
        counted: what it counts as: share of the map that is exact, and further work.
        backend: who computes it.
        steps: of the run.
        formats: what the ledger says about the layer's number formats, ``None`` for 16 bit.
    """

    def __init__(
        self,
        state: LayerState,
        plan: Plan,
        given: tuple[Tensor, Tensor, Tensor],
        scale: float | None,
        launches: Launches,
        counted: tuple[Tensor, Tensor | float],
        backend: str,
        steps: int | None,
        formats: tuple[str, frozenset[int]] | None,
    ) -> None:
        query, key, value = given
        self._state, self._plan, self._replays, self._launches = state, plan, plan.replays, launches
        self._at, self._scale, self._counted = state.planned_at, scale, counted
        self._backend, self._steps, self._formats = backend, steps, formats
        self._shape, self._dtype, self._index = query.shape, query.dtype, query.get_device()
        self._strides, self._device = (query.stride(), key.stride(), value.stride()), query.device
        self._native: Any = None

    def __call__(
        self, run: ModelRun, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None
    ) -> Tensor | None:
        """What the run's ``attend`` would return, ``[B, S, H, D]`` in one piece, or ``None`` if it has to be asked."""
        if not (self._like_before(query, key, value) and scale == self._scale and self._scheduled(run)):
            return None
        replays = self._replays
        if replays is None or self._plan.replays is not replays or not replays.holds(self._plan):
            return None
        made = self._launches.like(query, (query, key, value))
        if made is None:
            return None
        self.count(run, layer, run._step.step, 1)
        return made

    def count(self, run: ModelRun, layer: int, step: int | None, calls: int) -> None:
        """Say to the run's ledger that the call was made so many times."""
        ledger, exact = run.ledger, self._counted
        ledger.backend = self._backend
        for _ in range(calls):
            ledger.count_sparse(step, layer, exact[0], exact[1], reused=True)
        if self._formats is not None:
            ledger.precisions[layer] = self._formats
        run._cross.note(layer, sparse=True)

    def armed(self, run: ModelRun, module: Any, quiet: tuple[list[Any], ...]) -> tuple[Any, Any] | None:
        """The call for the module in C, with what must live meanwhile; ``None`` where it has to be asked.

        Args:
            run: whose forward call begins.
            module: of :mod:`dit_accel_kernels.native`.
            quiet: lists that must be empty when the call is made.
        """
        plan, replays = self._plan, self._replays
        if self._native is False or not self._scheduled(run):
            return None
        if replays is None or plan.replays is not replays or not replays.holds(plan):
            return None
        if self._native is None:
            from dit_accel_kernels.native.packing import Form, make_call

            form = Form(tuple(self._shape), self._strides, self._dtype, self._device)
            self._native = make_call(module, self._launches, form, self._scale, quiet) or False
        # The lists may be dropped by another layer's call, and all else by whoever holds the plan.
        return (self._native, (self._launches, replays.used(plan))) if self._native else None

    def _like_before(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether the tensors have the layout that they had, and nobody writes down what is computed."""
        shape, dtype = self._shape, self._dtype
        return (
            type(query) is Tensor
            and query.shape == shape
            and key.shape == shape
            and value.shape == shape
            and (query.stride(), key.stride(), value.stride()) == self._strides
            and query.dtype is dtype
            and key.dtype is dtype
            and value.dtype is dtype
            and query.get_device() == self._index
            and not torch.is_grad_enabled()
            and not recorded()
        )

    def _scheduled(self, run: ModelRun) -> bool:
        """Whether the schedule says again what it said, to a plan that is still in force."""
        state, at, step = self._state, self._at, run._step
        if state.plan is not self._plan or state.old or state.planned_at != at or step.steps != self._steps:
            return False
        if at is not None and step.step is not None and step.step <= at:
            return False
        return run._action(True, at) is Action.SPARSE


def settled(run: ModelRun, call: Call, plan: Plan, given: tuple[Tensor, Tensor, Tensor], out: Tensor) -> Settled | None:
    """What the next call like this one may do, ``None`` if it has to be asked anew.

    Args:
        run: whose call it was.
        call: a sparse call with a plan that was there before.
        plan: that plan.
        given: query, key and value ``[B, S, H, D]``.
        out: what it returned, ``[B, S, H, D]``.
    """
    state = run._states.get(run._key(call.layer, call.query.shape[0], False))
    if state is None or state.plan is not plan or plan.replays is None or not _stays(run, call, plan):
        return None
    query, key, value = given
    if not (query.shape == key.shape == value.shape == out.shape and out.is_contiguous()):
        return None
    if (out.stride(), out.dtype) != (torch.empty_like(query, device="meta").stride(), query.dtype):
        return None
    options = run._sparse_scale(call), run.ledger.backend, False
    launches = plan.replays.latest((call.query, call.key, call.value), options)
    if launches is None:
        return None
    counted = plan.density, plan.pooled_density + plan.gathered_density
    formats = run.ledger.precisions.get(call.layer)
    return Settled(state, plan, given, call.scale, launches, counted, run.ledger.backend, run._step.steps, formats)


def _stays(run: ModelRun, call: Call, plan: Plan) -> bool:
    """Whether nothing but the schedule, the plan and the layout decides about such calls."""
    method = run.method
    return (
        call.key_valid is None
        and call.more is None
        and run.static is None
        and run.share is None
        and not method.reuse_rules.similar
        and run._head_precisions is None
        and run._roles.leads(call.layer) == call.layer
        and run._lists.keeps(plan.mask)
    )
