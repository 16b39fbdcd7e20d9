"""The run state of one accelerated transformer: decides each attention call and carries it out."""

from __future__ import annotations

import logging
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from dit_accel.adapter import DenseFn, StepInfo
from dit_accel.blend import Blend
from dit_accel.context import PlanContext
from dit_accel.cross import CrossCache
from dit_accel.eligibility import Eligibility
from dit_accel.geometry import TokenGeometry
from dit_accel.layer_state import LayerState
from dit_accel.ledger import SCHEDULED, Ledger, RunStatus
from dit_accel.logging import get_logger, warn_once
from dit_accel.mask import ListCache
from dit_accel.masked import fill_blind
from dit_accel.method import Method
from dit_accel.more_keys import MoreKeys
from dit_accel.plan import Plan, execute_with_lse
from dit_accel.planner import Planner
from dit_accel.policy import Action, Policy
from dit_accel.precision.by_head import HeadPrecisions
from dit_accel.score import SCORES
from dit_accel.share import HeadShare
from dit_accel.static_plan import Recorder, StaticPlan
from dit_accel.work import LayerRoles
from dit_accel_kernels import attention_lse, dense_attention

if TYPE_CHECKING:
    from dit_accel.calibration.observe import Observer
    from dit_accel.cost import CostModel
    from dit_accel.targets.control import Control

__all__ = ["ModelRun"]

_logger: logging.Logger = get_logger(__name__)

_LIST_BYTES = 2 << 30
_NOT_FINITE = "attention scores were not finite: NaN or infinity in q or k"


class _Call(NamedTuple):
    """One attention call, ``[B, H, S, D]`` in natural order; keys of the sequence alone."""

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    key_valid: Tensor | None
    scale: float | None
    geometry: TokenGeometry
    more: MoreKeys | None


class _Decision(NamedTuple):
    """What a call does: a plan to carry out, or the dense output and log-sum-exp of a planning step, or why it is dense."""

    plan: Plan | None = None
    dense: tuple[Tensor, Tensor] | None = None
    reason: str = ""


class ModelRun:
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
        self.method = self._asked = method
        self.model = model
        self.backend = backend
        self.run_density = run_density
        self.static = static
        self._module = None if module is None else weakref.ref(module)
        self.control = control
        self.cost = cost
        self.recorder: Recorder | None = None
        self.observer: Observer | None = None
        self.share: HeadShare | None = None
        self.policy = Policy(method)
        self.planner = Planner(method)
        self.ledger = Ledger()
        self.layers = layers
        self.blends: list[Blend] = []
        self._roles = LayerRoles()
        self._states: dict[tuple[int, str, int, bool], LayerState] = {}
        self._branches: set[str] = set()
        self._geometry: TokenGeometry | str = "the transformer was not entered through its forward"
        self._step = StepInfo()
        self._eligible = Eligibility(method, backend, min_tokens, static)
        rule = method.precision_rule
        self._head_precisions = HeadPrecisions(rule.max_error) if rule.candidates else None
        self._lists = ListCache(_LIST_BYTES)
        self._cross = CrossCache(method.cross_attention)
        self._fresh = True
        # What the layers of one forward call would ask in vain again.
        self._answers: dict[Any, tuple[str | None, str | None]] = {}
        self._actions: dict[tuple[bool, int | None, bool], Action] = {}

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
        self.ledger.geometry = str(geometry)
        if begins and self.control is not None and isinstance(geometry, TokenGeometry):
            for note in self.control.begin(geometry):
                self.ledger.flag(note, torch.tensor(False))
        if begins and self.run_density is not None and isinstance(geometry, TokenGeometry):
            self._density(geometry)  # what cannot be reached is said before anything is computed

    def reset(self) -> None:
        """End of a run: forget its plans. What was counted stays until the next run begins."""
        self._forget()
        self._lists.clear()
        self._cross.clear()
        self._fresh = True
        calibrates = self.recorder is not None or self.observer is not None
        self.ledger.warn_if_all_dense(self.model, self.method.is_dense or calibrates)

    def _forget(self) -> None:
        self._states.clear()
        if self._head_precisions is not None:
            self._head_precisions.clear()

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

    def placement(self, layer: int, batch: int, masked: bool) -> HeadShare | None:
        """The heads of the plan in force that a call would use, ``None`` where no plan says."""
        state = self._states.get(self._key(layer, batch, masked))
        return None if state is None or state.plan is None else state.plan.placement

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
        call = _Call(layer, q, k, v, key_valid, scale, geometry, more)
        # Processes that share a transformer must decide alike, and time is not the same in all of them.
        pays = self.cost is None or self.share is not None
        reason = None if pays or self.cost is None else self._why_not_paying(call, self.cost)
        if reason is not None:
            self._count_dense(layer, reason)
            return dense(query, key, value)
        decision = self._decide(call)
        if decision.plan is not None:
            return self._sparse(call, decision.plan).transpose(1, 2)
        self._count_dense(layer, decision.reason)
        if decision.dense is None:
            return dense(query, key, value)
        out, lse = decision.dense
        return (out if more is None else more.join(q, out, lse, scale)[0]).transpose(1, 2)

    def _sparse(self, call: _Call, plan: Plan) -> Tensor:
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

    def _sparse_scale(self, call: _Call) -> float | None:
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

    def _fit(self, query: Tensor) -> None:
        """Take the block sizes of the kernel that will serve such queries ``[B, S, H, D]``."""
        if self._asked.hopper_blocks is None or self.static is not None:
            return
        method = self._eligible.fitted(self._asked, query)
        if (method.block_q, method.block_k) == (self.method.block_q, self.method.block_k):
            return
        self._forget()
        self.method = self._eligible.method = method
        self.policy, planner = Policy(method), Planner(method)
        self.planner = planner if self.share is None else self.share.planner(planner)

    def _why_not_paying(self, call: _Call, cost: CostModel) -> str | None:
        """Why this call would not be faster, ``None`` where it would or was not measured."""
        from dit_accel.cost.model import PayCall

        asked = PayCall(
            call.query, call.key, call.value, call.key_valid, call.scale, call.geometry, self._step, self.ledger.backend
        )
        return cost.why_not(self.planner, self.policy, asked)

    def _state(self, call: _Call) -> LayerState:
        """State of the layer whose plans this call uses. Masked calls have their own: their plans know the mask."""
        key = self._key(call.layer, call.query.shape[0], call.key_valid is not None)
        state = self._states.get(key)
        if state is None:
            state = self._states[key] = LayerState()
        return state

    def _key(self, layer: int, batch: int, masked: bool) -> tuple[int, str, int, bool]:
        branch = "" if self.method.branches == "shared" else self._step.branch
        return self._roles.leads(layer), branch, batch, masked

    def _decide(self, call: _Call) -> _Decision:
        """What this call does, planning if it is time."""
        if self.static is not None:
            if self.policy.action(self._step, True, None) is Action.DENSE:
                return _Decision(reason=self.policy.dense_reason(self._step))
            plan = self.static.plan(self.planner, call.geometry, call.layer, self._step, call.query.device)
            return self._carry_out(call, plan, reused=True)
        state, leader = self._state(call), self._roles.leads(call.layer)
        follows = leader != call.layer
        state.forget_if_again(self._step.step, self._step.branch, follows=follows)
        known = state.plan if state.plan is not None and state.plan.matches(call.query) else None
        if known is not None and known.placement not in (None, self.share):
            known = None  # it is that of other heads
        if follows:
            return self._follow(call, known, state, leader)
        turned = state.has_turned() if known is not None and state.branch == self._step.branch else False
        action = self._action(known is not None, state.planned_at, turned)
        if action is Action.DENSE:
            return _Decision(reason=self.policy.dense_reason(self._step))
        if not self.method.plans_from_data:
            return self._carry_out(call, known or self._pattern_plan(call, state), reused=True)
        dense_leader = call.layer in self._roles.dense
        if action is Action.SPARSE:
            assert known is not None
            similar = self.method.reuse_rules.similar
            watched = self._watched(call.query) if similar else call.query
            state.watch(watched, call.key_valid, similar, self._step.branch)
            return _Decision(reason="dense layer") if dense_leader else self._carry_out(call, known, reused=True)
        out = None
        if action is Action.DENSE_AND_PLAN or dense_leader:  # the attention of this step, not a cost of planning
            out = dense_attention(call.query, call.key, call.value, scale=call.scale, key_valid=call.key_valid)
        plan = self._plan(call, state, known, out)
        if out is not None:
            return _Decision(dense=out, reason="dense layer" if dense_leader else "planning step")
        return self._carry_out(call, plan, reused=False)

    def _action(self, planned: bool, planned_at: int | None, turned: bool = False) -> Action:
        """What the schedule says to a layer with a plan of this age."""
        asked = planned, planned_at, turned
        action = self._actions.get(asked)
        if action is None:
            action = self._actions[asked] = self.policy.action(self._step, planned, planned_at, turned)
        return action

    def _follow(self, call: _Call, known: Plan | None, state: LayerState, leader: int) -> _Decision:
        """What a layer does that uses the plans of another."""
        action = self._action(known is not None, state.planned_at)
        if action is Action.DENSE:
            return _Decision(reason=self.policy.dense_reason(self._step))
        if known is None or known.heads not in (1, call.query.shape[1]):
            return _Decision(reason=f"leader layer {leader} has no plan for this call")
        if known.order is not None and not known.parts:
            told = known.order_names, known.order.head
            # Those of all heads were told when the leader's plan was made.
            self.ledger.orders[call.layer] = told if self.share is None else self.ledger.orders.get(leader, told)
        return self._carry_out(call, known, reused=True)

    def _carry_out(self, call: _Call, plan: Plan, *, reused: bool) -> _Decision:
        """Count a sparse call."""
        self._cross.note(call.layer, sparse=True)
        exact, extra = plan.density, plan.pooled_density + plan.gathered_density
        if not self.method.precision_rule.wide:
            plan, measured = self._with_precision(call, plan)
            extra = extra + 2 * (exact.mean() + extra) if measured else extra
        if call.more is not None:
            share = call.more.share(call.geometry.tokens)
            exact, extra = exact * (1 - share) + share, extra * (1 - share)
        self.ledger.count_sparse(self._step.step, call.layer, exact, extra, reused=reused)
        return _Decision(plan)

    def _with_precision(self, call: _Call, plan: Plan) -> tuple[Plan, bool]:
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

    def _pattern_plan(self, call: _Call, state: LayerState) -> Plan:
        device = call.query.device
        with self.ledger.timer.measure(device):
            density = self._density(call.geometry)
            state.plan = self.planner.pattern_plan(call.geometry, device, density, call.query.shape[1], call.layer)
        return state.plan

    def _plan(self, call: _Call, state: LayerState, known: Plan | None, out: tuple[Tensor, Tensor] | None) -> Plan:
        """Make a plan, and put it in force."""
        q, k, extra = call.query, call.key, 0.0
        lse = out[1] if out is not None else known.lse if known is not None else None
        with self.ledger.timer.measure(q.device):
            if lse is None and self.policy.needs_lse:
                lse, extra = attention_lse(q, k, scale=call.scale, key_valid=call.key_valid), 0.5
            keeps = known is not None and not known.parts and not self.method.is_geometric
            order = known.order if known is not None and keeps else None
            if order is None and self.control is not None:
                order = self.control.head_orders(self.planner, call.geometry, call.layer, q.device)
            ctx = self.planner.context(
                q,
                k,
                call.value,
                lse,
                call.geometry,
                density=self._density(call.geometry),
                scale=call.scale,
                key_valid=call.key_valid,
                order=order,
            )
            ctx.layer, ctx.step, ctx.memory = call.layer, self._step, state.memory
            ctx.dense_out, ctx.control = None if out is None else out[0], self.control
            plan = self._make_plan(ctx)
            watched = self._watched(q) if self.method.reuse_rules.similar else None
            kept = plan if self.share is None else self.share.kept(self.method, plan, state.memory)
            state.keep(kept, self._step.step, self._step.branch, watched, call.key_valid)
        self.ledger.count_plan(self._step.step, call.layer, plan.cost + extra)
        if plan.finite is not None:
            self.ledger.flag(_NOT_FINITE, plan.finite)
        return plan

    def _watched(self, query: Tensor) -> Tensor:
        """What similarity is judged by: queries, or where others have some of the heads, the mean query of all heads."""
        return query if self.share is None else self.share.gather(query.mean(2, keepdim=True, dtype=torch.float32))

    def _make_plan(self, ctx: PlanContext) -> Plan:
        plan = self.planner.plan(ctx)
        if self.policy.refreshes_later(self._step):
            plan.lse = ctx.lse
        if plan.order is not None and not plan.parts:
            head = plan.order.head if self.share is None else self.share.gather(plan.order.head, 0)
            self.ledger.orders[ctx.layer] = (plan.order_names, head)
        return plan

    def _density(self, geometry: TokenGeometry) -> float | None:
        """Share of the map to compute on sparse steps, ``None`` where the method's own parameters decide.

        Raises:
            ValueError: if ``run_density`` was asked for and cannot be reached, or the steps of the run are unknown.
        """
        if self.run_density is None:
            return self.policy.density(self._step)
        if self._step.steps is None:
            raise ValueError(
                "run_density needs the number of steps, which this call does not tell; give density instead"
            )
        branches = max(len(self._branches), 1) if self.method.branches == "shared" else 1
        mean = self._roles.sparse_density(
            self.run_density, self._step.steps, self.policy, self.planner, geometry, branches
        )
        return self.policy.share_of(mean, self._step)

    def _count_dense(self, layer: int, reason: str) -> None:
        self._cross.note(layer, sparse=False)
        self.ledger.count_dense(self._step.step, layer, reason)
        if reason not in SCHEDULED:
            warn_once(_logger, (self.model, reason), f"{self.model} stays dense: {reason}")
