"""When a layer is dense, when it plans and when it is sparse."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from dit_accel.adapter import StepInfo
from dit_accel.method import Method

__all__ = ["Action", "Policy"]

_EPS = 1e-6


class Action(Enum):
    """What one attention call does."""

    DENSE = "dense"
    DENSE_AND_PLAN = "dense and plan"
    PLAN = "plan"
    SPARSE = "sparse"


@dataclass(frozen=True)
class Policy:
    """The schedule of a method.

    With known steps, warm-up share ``w`` and ``n`` steps, the first ``ceil(w n)`` steps are dense
    and the plan is made on the last of them, whose dense attention gives the log-sum-exp for free
    (AdaSpa's fused search, arXiv 2502.21079). Without warm-up the first step is planned and sparse.
    Without known steps, the plan is made on the first call beyond the warm-up share.
    """

    method: Method

    def warmup_steps(self, steps: int) -> int:
        """Dense steps at the start of a run of ``steps``."""
        return min(math.ceil(self.method.warmup * steps - _EPS), steps)

    def refresh_steps(self, steps: int) -> tuple[int, ...]:
        """Steps at which the plan is made again."""
        first = self.warmup_steps(steps)
        shares = self.method.refresh
        if not shares and isinstance(self.method.density, tuple):
            rest = 1 - self.method.warmup
            shares = (self.method.warmup + rest / 3, self.method.warmup + 2 * rest / 3)
        found = {round(share * steps) for share in shares}
        return tuple(sorted(s for s in found if first <= s < steps))

    def dense_tail(self, step: StepInfo) -> bool:
        """Whether the call lies behind the method's end share."""
        if self.method.end >= 1:
            return False
        if step.step is not None and step.steps:
            return step.step >= math.ceil(self.method.end * step.steps - _EPS)
        return step.progress is not None and step.progress >= self.method.end

    @property
    def needs_lse(self) -> bool:
        """Whether plans are made from the log-sum-exp of a dense step."""
        return self.method.score == "mass" or self.method.order_choice != "fixed"

    def warming(self, step: StepInfo) -> bool:
        """Whether the call is dense because the run has just begun.

        The last warm-up step is not: it is where a plan is made, if that takes a dense step.
        """
        if step.step is not None and step.steps:
            return step.step < self.warmup_steps(step.steps) - (1 if self.needs_lse else 0)
        return step.progress is not None and step.progress < self.method.warmup - _EPS

    def plans_densely(self, step: StepInfo) -> bool:
        """Whether the step at which the plan is made computes dense attention.

        It does after a warm-up. Without one the log-sum-exp is computed on its own, so that models
        of few steps have no dense step.
        """
        known = (step.step is not None and bool(step.steps)) or step.progress is not None
        return self.needs_lse and self.method.warmup > 0 and known

    def refreshes(self, step: StepInfo, planned_at: int | None) -> bool:
        """Whether an existing plan, made at step ``planned_at``, is made again on this call."""
        if step.step is None or not step.steps or planned_at is None:
            return False
        return any(planned_at < s <= step.step for s in self.refresh_steps(step.steps))

    def action(self, step: StepInfo, planned: bool, planned_at: int | None) -> Action:
        """What to do, for a layer and branch that has a plan or not."""
        if self.dense_tail(step) or self.warming(step):
            return Action.DENSE
        if self.method.score == "window":
            return Action.SPARSE
        if not planned:
            return Action.DENSE_AND_PLAN if self.plans_densely(step) else Action.PLAN
        return Action.PLAN if self.refreshes(step, planned_at) else Action.SPARSE

    def progress(self, step: StepInfo) -> float:
        """Share of the run behind the call, 0 where unknown."""
        if step.step is not None and step.steps:
            return step.step / step.steps
        return step.progress if step.progress is not None else 0.0

    def sparse_density(self, run_density: float, steps: int, overhead: float = 0.0) -> float:
        """Density of sparse steps that gives ``run_density`` over a whole run.

        Args:
            run_density: work over the work of a dense run, planning and pooled keys included.
            steps: denoising steps.
            overhead: work of the pooled remainder on each sparse step, and planning spread over them.

        Raises:
            ValueError: if the warm-up alone costs more.
        """
        warm = self.warmup_steps(steps)
        sparse = steps - warm
        density = (run_density * steps - warm) / max(sparse, 1) - overhead
        if not sparse or density <= 0:
            raise ValueError(
                f"density {run_density:g} over the run cannot be reached: {warm} of {steps} steps are "
                f"dense and sparse steps cost {overhead:.3f} besides; lower warmup or raise it"
            )
        return min(density, 1.0)
