"""Which plan an attention call uses, and when one is made: the part of a run that looks at the schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dit_accel.adapter import StepInfo
from dit_accel.context import PlanContext
from dit_accel.geometry import TokenGeometry
from dit_accel.layer_state import LayerState, MaskFlags
from dit_accel.ledger import Ledger
from dit_accel.method import Method
from dit_accel.more_keys import MoreKeys
from dit_accel.plan import Plan
from dit_accel.planner import Planner
from dit_accel.policy import Action, Policy
from dit_accel.share import HeadShare
from dit_accel.static_plan import StaticPlan
from dit_accel.work import LayerRoles
from dit_accel_kernels import attention_lse, dense_attention

if TYPE_CHECKING:
    from dit_accel.targets.control import Control

__all__ = ["Call", "Decision", "PlannedRun"]

_NOT_FINITE = "attention scores were not finite: NaN or infinity in q or k"


class Call(NamedTuple):
    """One attention call, ``[B, H, S, D]`` in natural order; keys of the sequence alone."""

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    key_valid: Tensor | None
    scale: float | None
    geometry: TokenGeometry
    more: MoreKeys | None


class Decision(NamedTuple):
    """What a call does: a plan to carry out, or the dense output and log-sum-exp of a planning step, or why it is dense.

    Attributes:
        plan: the plan in force.
        reused: whether it was made for an earlier call.
        dense: output ``[B, H, S, D]`` and log-sum-exp ``[B, H, S]`` of a dense step that planned.
        reason: why the call is dense.
    """

    plan: Plan | None = None
    reused: bool = True
    dense: tuple[Tensor, Tensor] | None = None
    reason: str = ""


class PlannedRun:
    """Plans of one transformer over a run, one per (layer, branch, batch size), and the schedule that renews them.

    Args:
        method: what to do.
        run_density: work over the work of a dense run, from which the density of sparse steps follows.
        static: plan of a static method.
        control: what gives each head its density while plans are made, or ``None``.
    """

    def __init__(
        self,
        method: Method,
        *,
        run_density: float | None = None,
        static: StaticPlan | None = None,
        control: Control | None = None,
    ) -> None:
        self.run_density = run_density
        self.static = static
        self.control = control
        self.share: HeadShare | None = None
        self.ledger = Ledger()
        self._take(method)
        self._roles = LayerRoles()
        self._states: dict[tuple[int, str, int, bool], LayerState] = {}
        self._branches: set[str] = set()
        self._step = StepInfo()
        self._actions: dict[tuple[bool, int | None, bool], Action] = {}
        self._masks = MaskFlags()

    def _take(self, method: Method) -> None:
        """Put a method in force."""
        self.method = method
        self.policy, planner = Policy(method), Planner(method)
        self.planner = planner if self.share is None else self.share.planner(planner)

    def _forget(self) -> None:
        """Drop all plans."""
        self._states.clear()

    def placement(self, layer: int, batch: int, masked: bool) -> HeadShare | None:
        """The heads of the plan in force that a call would use, ``None`` where no plan says."""
        state = self._states.get(self._key(layer, batch, masked))
        return None if state is None or state.plan is None else state.plan.placement

    def _state(self, call: Call) -> LayerState:
        """State of the layer whose plans this call uses. Masked calls have their own: their plans know the mask."""
        key = self._key(call.layer, call.query.shape[0], call.key_valid is not None)
        state = self._states.get(key)
        if state is None:
            state = self._states[key] = LayerState()
        return state

    def _key(self, layer: int, batch: int, masked: bool) -> tuple[int, str, int, bool]:
        branch = "" if self.method.branches == "shared" else self._step.branch
        return self._roles.leads(layer), branch, batch, masked

    def _decide(self, call: Call) -> Decision:
        """What this call does, planning if it is time."""
        if self.static is not None:
            if self.policy.action(self._step, True, None) is Action.DENSE:
                return Decision(reason=self.policy.dense_reason(self._step))
            plan = self.static.plan(self.planner, call.geometry, call.layer, self._step, call.query.device)
            return Decision(plan)
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
            return Decision(reason=self.policy.dense_reason(self._step))
        if not self.method.plans_from_data:
            return Decision(known or self._pattern_plan(call, state))
        dense_leader = call.layer in self._roles.dense
        if action is Action.SPARSE:
            assert known is not None
            similar = self.method.reuse_rules.similar
            watched = self._watched(call.query) if similar else call.query
            state.watch(watched, call.key_valid, similar, self._step.branch, self._masks)
            return Decision(reason="dense layer") if dense_leader else Decision(known)
        out = None
        if action is Action.DENSE_AND_PLAN or dense_leader:  # the attention of this step, not a cost of planning
            out = dense_attention(call.query, call.key, call.value, scale=call.scale, key_valid=call.key_valid)
        plan = self._plan(call, state, known, out)
        if out is not None:
            return Decision(dense=out, reason="dense layer" if dense_leader else "planning step")
        return Decision(plan, reused=False)

    def _action(self, planned: bool, planned_at: int | None, turned: bool = False) -> Action:
        """What the schedule says to a layer with a plan of this age."""
        asked = planned, planned_at, turned
        action = self._actions.get(asked)
        if action is None:
            action = self._actions[asked] = self.policy.action(self._step, planned, planned_at, turned)
        return action

    def _follow(self, call: Call, known: Plan | None, state: LayerState, leader: int) -> Decision:
        """What a layer does that uses the plans of another."""
        action = self._action(known is not None, state.planned_at)
        if action is Action.DENSE:
            return Decision(reason=self.policy.dense_reason(self._step))
        if known is None or known.heads not in (1, call.query.shape[1]):
            return Decision(reason=f"leader layer {leader} has no plan for this call")
        if known.order is not None and not known.parts:
            told = known.order_names, known.order.head
            # Those of all heads were told when the leader's plan was made.
            self.ledger.orders[call.layer] = told if self.share is None else self.ledger.orders.get(leader, told)
        return Decision(known)

    def _pattern_plan(self, call: Call, state: LayerState) -> Plan:
        device = call.query.device
        with self.ledger.timer.measure(device):
            density = self._density(call.geometry, call.query.shape[-1])
            state.plan = self.planner.pattern_plan(call.geometry, device, density, call.query.shape[1], call.layer)
        return state.plan

    def _plan(self, call: Call, state: LayerState, known: Plan | None, out: tuple[Tensor, Tensor] | None) -> Plan:
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
                density=self._density(call.geometry, call.query.shape[-1]),
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
        for note in ctx.notes:
            self.ledger.flag(note, torch.tensor(False))
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

    def _density(self, geometry: TokenGeometry, dim: int = 128) -> float | None:
        """Share of the map to compute on sparse steps, ``None`` where the method's own parameters decide.

        Args:
            geometry: where the tokens sit.
            dim: channels of a head.

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
            self.run_density, self._step.steps, self.policy, self.planner, geometry, branches, dim
        )
        return self.planner.density_of_free_rows(self.policy.share_of(mean, self._step), geometry)
