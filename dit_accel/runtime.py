"""The run state of one accelerated transformer: decides each attention call and carries it out."""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.adapter import DenseFn, StepInfo
from dit_accel.compensate import make_compensation
from dit_accel.context import PlanContext
from dit_accel.geometry import TokenGeometry
from dit_accel.ledger import SCHEDULED, Ledger, RunStatus
from dit_accel.logging import get_logger, warn_once
from dit_accel.mask import ListCache
from dit_accel.method import Method
from dit_accel.pattern import PATTERNS
from dit_accel.plan import Plan, execute
from dit_accel.planner import Planner
from dit_accel.policy import Action, Policy
from dit_accel.static_plan import Recorder, StaticPlan
from dit_accel_kernels import attention_lse, choose_backend, dense_attention
from dit_accel_kernels.backends import require_backend

__all__ = ["ModelRun"]

_logger: logging.Logger = get_logger(__name__)

_LIST_BYTES = 2 << 30
_NOT_FINITE = "attention scores were not finite: NaN or infinity in q or k"


@dataclass
class _LayerState:
    """What a layer remembers for one guidance branch and batch size."""

    plan: Plan | None = None
    planned_at: int | None = None
    branch: str = ""
    memory: dict[str, Any] = field(default_factory=dict)

    def forget_if_again(self, step: int | None, branch: str) -> None:
        """Drop a plan whose step comes again: the run that made it was interrupted."""
        if step is None or self.planned_at is None:
            return
        if step < self.planned_at or (step == self.planned_at and branch == self.branch):
            self.plan, self.planned_at = None, None
            self.memory.clear()


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
    ) -> None:
        self.method = method
        self.model = model
        self.backend = backend
        self.min_tokens = min_tokens
        self.run_density = run_density
        self.static = static
        self._module = None if module is None else weakref.ref(module)
        self.recorder: Recorder | None = None
        self.policy = Policy(method)
        self.planner = Planner(method)
        self.ledger = Ledger()
        self.layers = layers
        self._dense_layers: set[int] = set()
        self._states: dict[tuple[int, str, int], _LayerState] = {}
        self._geometry: TokenGeometry | str = "the transformer was not entered through its forward"
        self._step = StepInfo()
        self._backends: dict[tuple[Any, ...], tuple[str, str | None]] = {}
        self._lists = ListCache(_LIST_BYTES)
        self._fresh = True

    @property
    def module(self) -> nn.Module | None:
        """The transformer, if it still exists."""
        return None if self._module is None else self._module()

    def set_layers(self, layers: tuple[str, ...]) -> None:
        """Name the layers, once the integration has found them.

        Raises:
            ValueError: if the method's ``dense_layers`` name layers that do not exist.
        """
        self.layers = layers
        count = len(layers)
        bad = [i for i in self.method.dense_layers if not -count <= i < count]
        if bad:
            raise ValueError(f"dense_layers must lie in {-count}..{count - 1}, got {bad}")
        self._dense_layers = {i % count for i in self.method.dense_layers}

    def begin_forward(self, geometry: TokenGeometry | str, step: StepInfo) -> None:
        """Take over the geometry and the step of the forward call that starts."""
        begins, self._fresh = self._fresh, False
        if begins:
            self.ledger = Ledger()
        if geometry != self._geometry:
            self._states.clear()  # plans of another grid may have as many tokens
        self._geometry = geometry
        self._step = step
        self.ledger.geometry = str(geometry)
        if begins and self.run_density is not None and isinstance(geometry, TokenGeometry):
            self._density(geometry)  # what cannot be reached is said before anything is computed

    def reset(self) -> None:
        """End of a run: forget its plans. What was counted stays until the next run begins."""
        self._states.clear()
        self._lists.clear()
        self._fresh = True
        self.ledger.warn_if_all_dense(self.model, self.method.is_dense or self.recorder is not None)

    def decline(self, layer: int, reason: str) -> None:
        """Count a call that the integration sent to dense attention itself."""
        self._count_dense(layer, reason)

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
        """Self-attention of one layer, ``[B, S, H, D]`` in and out."""
        reason = self._why_dense(query, layer)
        if reason is not None:
            self._count_dense(layer, reason)
            return dense(query, key, value)
        geometry = self._geometry
        assert isinstance(geometry, TokenGeometry)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        if self.recorder is not None:
            self._count_dense(layer, "calibration")
            out, lse = dense_attention(q, k, v, scale=scale, key_valid=key_valid)
            self.recorder.observe(self, q, k, lse, layer, self._step, geometry, scale, key_valid)
            return out.transpose(1, 2)
        state = self._state(layer, q)
        plan, dense_out = self._plan_for(state, q, k, v, layer, geometry, scale, key_valid)
        if dense_out is not None:
            self._count_dense(layer, "planning step")
            return dense_out.transpose(1, 2)
        if plan is None:
            self._count_dense(layer, self.policy.dense_reason(self._step))
            return dense(query, key, value)
        backend = self.ledger.backend
        for part in plan.parts or (plan,):
            self._lists.touch(part.mask)
        factor = self.method.logit_factor(q.shape[2])
        if factor != 1.0:
            scale = factor * (q.shape[-1] ** -0.5 if scale is None else scale)
        out = execute(plan, q, k, v, scale=scale, key_valid=key_valid, backend=backend)
        return out.transpose(1, 2)

    def _why_dense(self, query: Tensor, layer: int) -> str | None:
        """Reason why this call stays dense whatever the schedule, or ``None``."""
        if self.method.is_dense:
            return "method 'dense'"
        if isinstance(self._geometry, str):
            return self._geometry
        if layer in self._dense_layers:
            return "dense layer"
        tokens = query.shape[1]
        reason = self._geometry.check(tokens)
        if reason is not None:
            return reason
        if tokens < self.min_tokens:
            return f"{tokens} tokens are fewer than min_tokens={self.min_tokens}"
        if self._geometry.grid is None and self._needs_grid:
            return f"method {self.method.name!r} needs a grid, the geometry is {self._geometry}"
        if query.requires_grad and torch.is_grad_enabled():
            return "gradients are needed, sparse attention is for inference"
        return self._why_no_static(layer, query.shape[2]) or self._why_no_backend(query)

    @property
    def _needs_grid(self) -> bool:
        """Whether the method cannot do without frames, height and width."""
        if self.method.is_geometric and PATTERNS.trait(self.method.score, "needs_grid", True):
            return True
        return self.method.order != ("raster",) and self.method.content_order is None

    def _why_no_static(self, layer: int, heads: int) -> str | None:
        if not self.method.static or self.recorder is not None:
            return None
        if self.static is None:
            return f"method {self.method.name!r} needs a plan from calibrate()"
        return self.static.why_not(self._geometry, layer, heads)

    def _state(self, layer: int, q: Tensor) -> _LayerState:
        branch = "" if self.method.branches == "shared" else self._step.branch
        return self._states.setdefault((layer, branch, q.shape[0]), _LayerState())

    def _plan_for(
        self,
        state: _LayerState,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: int,
        geometry: TokenGeometry,
        scale: float | None,
        key_valid: Tensor | None,
    ) -> tuple[Plan | None, Tensor | None]:
        """The plan of this call, or the dense output of a planning step, or neither on dense steps."""
        if self.static is not None:
            plan = self.static.plan(self.planner, geometry, layer, self._step, q.device)
            self._count_sparse(plan, layer, reused=True)
            return plan, None
        state.forget_if_again(self._step.step, self._step.branch)
        known = state.plan if state.plan is not None and state.plan.matches(q) else None
        action = self.policy.action(self._step, known is not None, state.planned_at)
        if action is Action.DENSE:
            return None, None
        if not self.method.plans_from_data:
            if known is None:
                with self.ledger.timer.measure(q.device):
                    density = self._density(geometry)
                    known = state.plan = self.planner.pattern_plan(geometry, q.device, density, q.shape[1], layer)
            self._count_sparse(known, layer, reused=True)
            return known, None
        if action is Action.SPARSE:
            assert known is not None
            self._count_sparse(known, layer, reused=True)
            return known, None
        out, extra = None, 0.0
        lse = known.lse if known is not None else None
        if action is Action.DENSE_AND_PLAN:  # the attention of this step, not a cost of planning
            out, lse = dense_attention(q, k, v, scale=scale, key_valid=key_valid)
        with self.ledger.timer.measure(q.device):
            if lse is None and self.policy.needs_lse:
                lse, extra = attention_lse(q, k, scale=scale, key_valid=key_valid), 0.5
            order = known.order if known is not None and not known.parts else None
            ctx = self.planner.context(
                q, k, v, lse, geometry, density=self._density(geometry), scale=scale, key_valid=key_valid, order=order
            )
            ctx.layer, ctx.step, ctx.memory, ctx.dense_out = layer, self._step, state.memory, out
            plan = self._make_plan(ctx)
        state.plan, state.planned_at, state.branch = plan, self._step.step, self._step.branch
        self.ledger.count_plan(self._step.step, layer, plan.cost + extra)
        if plan.finite is not None:
            self.ledger.flag(_NOT_FINITE, plan.finite)
        if out is None:
            self._count_sparse(plan, layer, reused=False)
        return plan, out

    def _make_plan(self, ctx: PlanContext) -> Plan:
        plan = self.planner.plan(ctx)
        if self._will_refresh():
            plan.lse = ctx.lse
        if plan.order is not None and not plan.parts:
            self.ledger.orders[ctx.layer] = (plan.order_names, plan.order.head)
        return plan

    def _density(self, geometry: TokenGeometry) -> float | None:
        """Share of the map to compute on sparse steps, ``None`` where the method's own parameters decide.

        Raises:
            ValueError: if ``run_density`` was asked for and cannot be reached, or the steps of the run are unknown.
        """
        steps = self._step.steps
        if self.run_density is None:
            return self.policy.density(self._step)
        if steps is None:
            raise ValueError(
                "run_density needs the number of steps, which this call does not tell; give density instead"
            )
        count, kept_dense = max(len(self.layers), 1), len(self._dense_layers)
        target = (self.run_density * count - kept_dense) / max(count - kept_dense, 1)
        planning, pooled = 0.0, 0.0
        if self.method.plans_from_data:
            first, again = self.planner.costs(geometry)
            planning = first + again * self.policy.plan_times(steps)
            planning += 0.5 if self.policy.needs_lse and not self.policy.plans_densely(self._step) else 0.0
        if make_compensation(self.method.compensate).pooled:
            pooled = 1 / self.method.block_k
        return self.policy.sparse_density(target, steps, pooled, planning)

    def _will_refresh(self) -> bool:
        step = self._step
        if step.step is None or not step.steps or not self.policy.needs_lse:
            return False
        rules = self.method.reuse_rules
        if rules.every or rules.similar:
            return True
        return any(s > step.step for s in self.policy.refresh_steps(step.steps))

    def _why_no_backend(self, query: Tensor) -> str | None:
        """Choose the kernel backend for this device, dtype and head size, or say why there is none.

        Raises:
            ValueError: if the backend that was asked for cannot run here.
            RuntimeError: if it failed its self-test.
        """
        need: dict[str, Any] = {
            "device": query.device,
            "dtype": query.dtype,
            "head_dim": query.shape[-1],
            "block_q": self.method.block_q,
            "block_k": self.method.block_k,
        }
        key = tuple(need.values())
        if key not in self._backends:
            if self.backend is not None:
                require_backend(self.backend, **need)
                self._backends[key] = (self.backend, None)
            else:
                name, reasons = choose_backend(**need)
                told = "; ".join(f"{other}: {reason}" for other, reason in reasons.items())
                missing = f"no fast backend ({told})" if name == "reference" else None
                self._backends[key] = (name, missing)
        name, reason = self._backends[key]
        self.ledger.backend = "" if reason else name
        return reason

    def _count_dense(self, layer: int, reason: str) -> None:
        self.ledger.count_dense(self._step.step, layer, reason)
        if reason not in SCHEDULED:
            warn_once(_logger, (self.model, reason), f"{self.model} stays dense: {reason}")

    def _count_sparse(self, plan: Plan, layer: int, *, reused: bool) -> None:
        extra = plan.pooled_density + plan.gathered_density
        self.ledger.count_sparse(self._step.step, layer, plan.density, extra, reused=reused)
