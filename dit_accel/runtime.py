"""The run state of one accelerated transformer: serves each attention call, or says why it stays dense."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dit_accel.adapter import DenseFn, StepInfo
from dit_accel.armed import Armed
from dit_accel.blend import Blend
from dit_accel.cross import CrossCache
from dit_accel.dense_steps import with_dense_steps
from dit_accel.eligibility import Eligibility
from dit_accel.geometry import TokenGeometry
from dit_accel.ledger import SCHEDULED, Ledger, RunStatus
from dit_accel.logging import get_logger, warn_once
from dit_accel.mask import ListCache
from dit_accel.masked import fill_blind
from dit_accel.method import Method
from dit_accel.more_keys import MoreKeys
from dit_accel.plan import Plan, execute_with_lse
from dit_accel.planned_run import Call, PlannedRun
from dit_accel.planner import Planner
from dit_accel.policy import Policy
from dit_accel.precision.by_head import HeadPrecisions
from dit_accel.score import SCORES
from dit_accel.settled import Settled, settled
from dit_accel.share import HeadShare
from dit_accel.static_plan import Recorder, StaticPlan
from dit_accel.work import LayerRoles
from dit_accel_kernels import dense_attention

if TYPE_CHECKING:
    from dit_accel.calibration.observe import Observer
    from dit_accel.cost import CostModel
    from dit_accel.targets.control import Control

__all__ = ["ModelRun"]

_logger: logging.Logger = get_logger(__name__)

_LIST_BYTES = 256 << 20


class ModelRun(PlannedRun):
    """Sparse attention for one transformer. Implements :class:`dit_accel.adapter.AttentionRun`.

    State is kept per (layer, branch, batch size) and forgotten by :meth:`reset`; nothing is a class
    attribute. One run at a time.

    Args:
        method: what to do.
        layers: module paths of the self-attention layers, in the order of their layer ids.
        model: class name of the transformer.
        backend: kernel backend, or ``None`` for the best that passes its self-test.
        min_tokens: shorter sequences stay dense.
        run_density: work over the work of a dense run, from which the density of sparse steps follows.
        static: plan of a static method.
        module: the transformer; only a weak reference is kept.
        control: what gives each head its density while plans are made, or ``None``.
        cost: keeps calls dense that would not be faster, or ``None``.
    """

    def __init__(
        self,
        method: Method,
        layers: tuple[str, ...] = (),
        *,
        model: str = "",
        backend: str | None = None,
        min_tokens: int = 2048,
        run_density: float | None = None,
        static: StaticPlan | None = None,
        module: nn.Module | None = None,
        control: Control | None = None,
        cost: CostModel | None = None,
    ) -> None:
        super().__init__(method, run_density=run_density, static=static, control=control)
        self._asked = self._fits = method
        self._fits_to: tuple[TokenGeometry, int | None] | None = None
        self.model = model
        self.backend = backend
        self._module = None if module is None else weakref.ref(module)
        self.cost = cost
        self.recorder: Recorder | None = None
        self.observer: Observer | None = None
        self.layers = layers
        self.blends: list[Blend] = []
        self._geometry: TokenGeometry | str = "the transformer was not entered through its forward"
        self._eligible = Eligibility(method, backend, min_tokens, static)
        rule = method.precision_rule
        self._head_precisions = HeadPrecisions(rule.max_error) if rule.candidates else None
        self._lists = ListCache(_LIST_BYTES)
        self._cross = CrossCache(method.cross_attention)
        self._fresh = True
        # What the layers of one forward call would ask in vain again.
        self._answers: dict[Any, tuple[str | None, str | None]] = {}
        self._settled: dict[tuple[str, int], Settled] = {}
        self._armed = Armed()

    @property
    def module(self) -> nn.Module | None:
        """The transformer, if it still exists."""
        return None if self._module is None else self._module()

    def set_layers(self, layers: tuple[str, ...]) -> None:
        """Name the layers, once the integration has found them.

        Raises:
            ValueError: if the method names layers that do not exist, or its scorer does not fit the model.
        """
        self.layers = layers
        self._roles = LayerRoles.of(self.policy, len(layers))
        if self.control is not None:
            self.control.join(layers)
        check = None if self.method.is_geometric else SCORES.trait(self.method.score, "check")
        if check is not None:
            check(self.method, self.model, layers)

    def begin_forward(self, geometry: TokenGeometry | str, step: StepInfo) -> None:
        """Take over the geometry and the step of the forward call that starts."""
        self.disarm()
        begins, self._fresh = self._fresh, False
        if begins:
            self.ledger = Ledger()
            self._branches.clear()
        self._branches.add(step.branch)
        if geometry != self._geometry:
            self._forget()  # plans of another grid may have as many tokens
        self._geometry = geometry
        self._step = step
        self._answers.clear()
        self._actions.clear()
        self._masks.clear()
        self.ledger.geometry = str(geometry)
        if isinstance(geometry, TokenGeometry):
            self._fit_grid(geometry, step.steps)
        if begins and self.control is not None and isinstance(geometry, TokenGeometry):
            for note in self.control.begin(geometry):
                self.ledger.flag(note, torch.tensor(False))
        if begins and self.run_density is not None and isinstance(geometry, TokenGeometry):
            self._density(geometry)  # what cannot be reached is said before anything is computed

    def _forget(self) -> None:
        """Drop all plans, and the number formats that were found for them."""
        super()._forget()
        self.disarm()
        self._settled.clear()
        if self._head_precisions is not None:
            self._head_precisions.clear()

    def reset(self) -> None:
        """End of a run: forget its plans. What was counted stays until the next run begins."""
        self._forget()
        self._lists.clear()
        self._cross.clear()
        self._fresh = True
        calibrates = self.recorder is not None or self.observer is not None
        self.ledger.warn_if_all_dense(self.model, self.method.is_dense or calibrates)

    def spread(self, share: HeadShare | None) -> None:
        """Take over which heads the next call has, where the transformer is spread over processes; ``None`` is all.

        Raises:
            ValueError: if a calibration is under way.
        """
        if share is not None and (self.recorder is not None or self.observer is not None):
            raise ValueError("calibrate() needs all heads in one process; calibrate without context parallelism")
        if share is None:
            self._forget()
            self.planner, self.static = Planner(self.method), getattr(self.static, "whole", self.static)
        else:
            self.planner, self.static = share.planner(self.planner), share.static(self.static)
        self.share, self._eligible.static = share, self.static

    def decline(self, layer: int, reason: str) -> None:
        """Count a call that the integration sent to dense attention itself."""
        self._count_dense(layer, reason)

    @property
    def wants_cross(self) -> bool:
        """Whether :meth:`cross` has to be called."""
        return self._cross.wanted

    def cross(self, layer: int, output: Tensor) -> Tensor:
        """What stands for the cross-attention output ``[B, S, C]`` of a layer; see :class:`CrossCache`."""
        return self._cross.override(layer, self._step.branch, output)

    def status(self) -> RunStatus:
        """What was computed in the latest run. Waits for the device."""
        self.disarm()
        return self.ledger.status(self.model, self.method.name, self.layers)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        layer: int,
        scale: float | None,
        key_valid: Tensor | None,
        dense: DenseFn,
    ) -> Tensor:
        """Self-attention of one layer, ``[B, S, H, D]`` in and out.

        Args:
            query: as many tokens as the geometry.
            key: like ``query``, or with further keys behind, which every query sees.
            value: like ``key``.
            layer: index of the layer.
            scale: factor of the logits, ``D ** -0.5`` if ``None``.
            key_valid: bool ``[B, Sk]``, false for keys that nobody sees, visual ones among them if need be.
            dense: what to call for dense attention.
        """
        out = self._attend(query, key, value, layer, scale, key_valid, dense)
        # What is spread over processes is blended when the heads are together again.
        return self.blended(out, value, layer) if self.blends and self.share is None else out

    def again(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor | None:
        """What :meth:`attend` returns without a mask, in one piece, where nothing is left to decide; else ``None``.

        Args:
            layer: index of the layer.
            query: ``[B, S, H, D]``.
            key: like ``query``.
            value: like ``key``.
            scale: factor of the logits, ``D ** -0.5`` if ``None``.
        """
        where = self._step.branch, layer
        found = self._settled.get(where)
        if found is None or self.blends or self.share is not None:
            return None
        if self.recorder is not None or self.observer is not None:
            return None
        out = found(self, layer, query, key, value, scale)
        if out is None:
            del self._settled[where]  # which keeps a plan that may just be made anew
        return out

    def arm(self, numbers: Mapping[int, int]) -> Any | None:
        """Have C make the settled calls of the forward call that has begun, until :meth:`disarm`.

        Args:
            numbers: process-wide number of each layer by its index.

        Returns:
            The module in C, ``None`` if it has nothing to do.
        """
        return self._armed.arm(self, numbers) if self._settled else None

    def disarm(self) -> None:
        """The forward call is over, or something has changed: every call is asked about again, and all are counted."""
        self._armed.disarm(self)

    def blended(self, out: Tensor, value: Tensor, layer: int) -> Tensor:
        """The output ``[B, S, H, D]`` of a layer after the blends in force; see :class:`Blend`."""
        for blend in self.blends:
            if blend.applies(layer, self._step):
                out = blend.apply(out, value, layer)
        return out

    def forget_blend(self, blend: Blend) -> None:
        """Take a blend out of force, if it is."""
        if blend in self.blends:
            self.blends.remove(blend)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layer: int,
        scale: float | None,
        key_valid: Tensor | None,
        dense: DenseFn,
    ) -> Tensor:
        reason = self._why_dense(query, key, key_valid, layer)
        if reason is not None:
            self._count_dense(layer, reason)
            return dense(query, key, value)
        geometry = self._geometry
        assert isinstance(geometry, TokenGeometry)
        q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        k, v, key_valid, more = MoreKeys.split(k, v, key_valid, geometry.tokens)
        if self.recorder is not None:
            self._count_dense(layer, "calibration")
            if more is not None:
                return dense(query, key, value)
            out, lse = dense_attention(q, k, v, scale=scale, key_valid=key_valid)
            self.recorder.observe(self, q, k, lse, layer, self._step, geometry, scale, key_valid)
            return out.transpose(1, 2)
        if self.observer is not None:
            self._count_dense(layer, "calibration")
            if more is not None:
                return dense(query, key, value)
            out, lse = dense_attention(q, k, v, scale=scale, key_valid=key_valid)
            self.observer.observe(self, (q, k, v), out, lse, layer, self._step, geometry, scale, key_valid)
            return out.transpose(1, 2)
        call = Call(layer, q, k, v, key_valid, scale, geometry, more)
        # Processes that share a transformer must decide alike, and time is not the same in all of them.
        pays = self.cost is None or self.share is not None
        reason = None if pays or self.cost is None else self._why_not_paying(call, self.cost)
        if reason is not None:
            self._count_dense(layer, reason)
            return dense(query, key, value)
        decision = self._decide(call)
        if decision.plan is not None:
            plan = self._counted(call, decision.plan, reused=decision.reused)
            out = self._sparse(call, plan).transpose(1, 2)
            if decision.reused and key_valid is None and plan.replays is not None:
                found = settled(self, call, plan, (query, key, value), out)
                if found is not None:
                    self._settled[self._step.branch, layer] = found
            return out
        self._count_dense(layer, decision.reason)
        if decision.dense is None:
            return dense(query, key, value)
        out, lse = decision.dense
        return (out if more is None else more.join(q, out, lse, scale)[0]).transpose(1, 2)

    def _sparse(self, call: Call, plan: Plan) -> Tensor:
        """Carry out a plan, ``[B, H, S, D]``."""
        q, more = call.query, call.more
        for part in plan.leaves:
            self._lists.touch(part.mask)
        scale = self._sparse_scale(call)
        # Without text every mask hides visual tokens, and may hide all that a query's blocks hold.
        hides = call.key_valid is not None and call.geometry.extra == 0
        out, lse = execute_with_lse(
            plan,
            q,
            call.key,
            call.value,
            scale=scale,
            key_valid=call.key_valid,
            backend=self.ledger.backend,
            want_lse=more is not None or hides,
        )
        if more is not None and lse is not None:
            out, lse = more.join(q, out, lse, scale)
        if hides and lse is not None and call.key_valid is not None:
            out = fill_blind(out, lse, call.value, call.key_valid)
        return out

    def _sparse_scale(self, call: Call) -> float | None:
        """Factor of the logits of a sparse call, ``None`` for ``D ** -0.5``."""
        factor, scale = self.method.logit_factor(call.query.shape[2]), call.scale
        if factor == 1.0:
            return scale
        return factor * (call.query.shape[-1] ** -0.5 if scale is None else scale)

    def _why_dense(self, query: Tensor, key: Tensor, key_valid: Tensor | None, layer: int) -> str | None:
        """Reason why this call stays dense whatever the schedule, or ``None``."""
        if self.method.is_dense:
            return "method 'dense'"
        if isinstance(self._geometry, str):
            return self._geometry
        if self.share is not None:
            reason = self.share.why_not(self.method, self.control is not None)
            if reason is not None:
                return reason
        calibrating = self.recorder is not None or self.observer is not None
        if layer in self._roles.dense and (layer not in self._roles.planners or calibrating):
            return "dense layer"
        asked = None
        if not (self.method.static or (query.requires_grad and torch.is_grad_enabled())):
            asked = (query.shape, key.shape, query.dtype, query.device, key_valid is None, calibrating)
        found = self._answers.get(asked)
        if found is None:
            found = self._served(query, key, key_valid, layer, calibrating)
            if asked is not None:
                self._answers[asked] = found
        reason, name = found
        if name is not None:
            self.ledger.backend = name
        return reason

    def _served(
        self, query: Tensor, key: Tensor, key_valid: Tensor | None, layer: int, calibrating: bool
    ) -> tuple[str | None, str | None]:
        """Reason why a call of such tensors cannot be served or ``None``, and the backend if it came to that."""
        assert isinstance(self._geometry, TokenGeometry)
        self._fit(query)
        reason = self._eligible.why_dense(query, key, key_valid, layer, self._geometry, calibrating=calibrating)
        if reason is not None:
            return reason, None
        name, reason = self._eligible.backend(query)
        if reason is None and not self.method.precision_rule.wide:
            self._eligible.precision(query, name)  # what was named and cannot be is said before anything is planned
        return reason, "" if reason else name

    def _fit_grid(self, geometry: TokenGeometry, steps: int | None) -> None:
        """Take the method that fits a picture or a video; what was calibrated, and targets, know the method as it is."""
        if self.static is not None or self.control is not None or self._fits_to == (geometry, steps):
            return
        self._fits_to = geometry, steps
        method = with_dense_steps(self._asked.fitting(geometry), self.run_density, steps)
        if method is not self._asked and not self._reaches(method, geometry, steps):
            method = self._asked  # its remainder costs less
        if method is self._fits:
            return
        self._forget()
        self._fits = self._eligible.method = method
        self._take(method)

    def _reaches(self, method: Method, geometry: TokenGeometry, steps: int | None) -> bool:
        """Whether a method can do with the work that was asked for."""
        if self.run_density is None or not steps:
            return True
        try:
            self._roles.sparse_density(self.run_density, steps, Policy(method), Planner(method), geometry, 1)
        except ValueError:
            return False
        return True

    def _fit(self, query: Tensor) -> None:
        """Take the block sizes of the kernel that will serve such queries ``[B, S, H, D]``."""
        if self._fits.hopper_blocks is None or self.static is not None:
            return
        method = self._eligible.fitted(self._fits, query)
        if (method.block_q, method.block_k) == (self.method.block_q, self.method.block_k):
            return
        self._forget()
        self._eligible.method = method
        self._take(method)

    def _why_not_paying(self, call: Call, cost: CostModel) -> str | None:
        """Why this call would not be faster, ``None`` where it would or was not measured."""
        from dit_accel.cost.model import PayCall

        asked = PayCall(
            call.query, call.key, call.value, call.key_valid, call.scale, call.geometry, self._step, self.ledger.backend
        )
        return cost.why_not(self.planner, self.policy, asked)

    def _counted(self, call: Call, plan: Plan, *, reused: bool) -> Plan:
        """Count a sparse call; the plan with its number formats."""
        self._cross.note(call.layer, sparse=True)
        exact, extra = plan.density, plan.pooled_density + plan.gathered_density
        if not self.method.precision_rule.wide:
            plan, measured = self._with_precision(call, plan)
            extra = extra + 2 * (exact.mean() + extra) if measured else extra
        if call.more is not None:
            share = call.more.share(call.geometry.tokens)
            exact, extra = exact * (1 - share) + share, extra * (1 - share)
        self.ledger.count_sparse(self._step.step, call.layer, exact, extra, reused=reused)
        return plan

    def _with_precision(self, call: Call, plan: Plan) -> tuple[Plan, bool]:
        """A plan with its number formats, and whether they were measured, which takes two sparse calls."""
        name, precision, why_wide = self._eligible.precision(call.query, self.ledger.backend)
        if self._head_precisions is None:
            self.ledger.note_precision(call.layer, name)
            return plan, False
        if self.share is not None:
            why_wide = "precision='auto' is 16 bit where heads are spread over processes; name a precision"
        if precision is None or why_wide:
            if all(text != why_wide for text, _ in self.ledger.flags):
                self.ledger.flag(why_wide, torch.tensor(False))
            return plan, False
        branch = "" if self.method.branches == "shared" else self._step.branch
        settled = self._head_precisions.settle(
            (call.layer, branch, call.query.shape[:2], call.key_valid is not None),
            plan,
            precision,
            (call.query, call.key, call.value),
            scale=self._sparse_scale(call),
            key_valid=call.key_valid,
            backend=self.ledger.backend,
        )
        if len(settled.wide) < call.query.shape[1]:
            self.ledger.note_precision(call.layer, name, settled.wide)
        return settled.plan, settled.measured

    def _count_dense(self, layer: int, reason: str) -> None:
        self._cross.note(layer, sparse=False)
        self.ledger.count_dense(self._step.step, layer, reason)
        if reason not in SCHEDULED:
            warn_once(_logger, (self.model, reason), f"{self.model} stays dense: {reason}")
