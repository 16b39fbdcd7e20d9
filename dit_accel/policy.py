"""When a layer is dense, when it plans and when it is sparse."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import NamedTuple

from dit_accel.adapter import StepInfo
from dit_accel.compensate import make_compensation
from dit_accel.method import Method

__all__ = ["Action", "Course", "Policy"]

_EPS = 1e-6


class Action(Enum):
    """What one attention call does."""

    DENSE = "dense"
    DENSE_AND_PLAN = "dense and plan"
    PLAN = "plan"
    SPARSE = "sparse"


class Course(NamedTuple):
    """What a layer does over a run, similarity aside.

    Attributes:
        dense: steps with dense attention, those that plan among them.
        sparse: steps with sparse attention.
        plans: plans made.
    """

    dense: int
    sparse: int
    plans: int


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
            rest = max(self.method.end - self.method.warmup, 0.0)
            shares = (self.method.warmup + rest / 3, self.method.warmup + 2 * rest / 3)
        found = {round(share * steps) for share in shares}
        return tuple(sorted(s for s in found if first <= s < self.sparse_end(steps)))

    def sparse_end(self, steps: int) -> int:
        """The step at which attention is dense again, ``steps`` if it never is."""
        return min(math.ceil(self.method.end * steps - _EPS), steps)

    def density(self, step: StepInfo) -> float | None:
        """Density of a plan made at ``step``: a falling one takes equal steps from plan to plan."""
        if step.step is None or not step.steps:
            span = max(self.method.end - self.method.warmup, _EPS)
            return self.method.density_at((self.progress(step) - self.method.warmup) / span)
        refreshes = self.refresh_steps(step.steps)
        made = sum(s <= step.step for s in refreshes)
        return self.method.density_at(made / max(len(refreshes), 1))

    def share_of(self, density: float, step: StepInfo) -> float:
        """What a plan made at ``step`` gets of a mean ``density`` of all sparse steps, where it falls over the run.

        A falling density of the method then only says how steep; what one plan cannot use, as it is dense already, is lost.
        """
        if not isinstance(self.method.density, tuple) or not step.steps:
            return density
        mean, own = _mean_density(self, step.steps), self.density(step)
        return density if own is None or mean <= 0 else min(density * own / mean, 1.0)

    def dense_tail(self, step: StepInfo) -> bool:
        """Whether the call lies behind the method's end share."""
        if self.method.end >= 1:
            return False
        if step.step is not None and step.steps:
            return step.step >= self.sparse_end(step.steps)
        return step.progress is not None and step.progress >= self.method.end

    @property
    def needs_lse(self) -> bool:
        """Whether plans are made from the log-sum-exp of a dense step."""
        return self.method.needs_lse

    @property
    def compares(self) -> bool:
        """Whether each plan compares its output with that of dense attention."""
        return make_compensation(self.method.compensate).needs_dense

    @property
    def dense_plans(self) -> bool:
        """Whether every plan is made on a dense step, refreshes included."""
        return self.compares or self.method.reuse_rules.every_dense

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
        of few steps have no dense step; see :attr:`dense_plans` for those that always have one.
        """
        if self.dense_plans:
            return True
        known = (step.step is not None and bool(step.steps)) or step.progress is not None
        return self.needs_lse and self.method.warmup > 0 and known

    def refreshes(self, step: StepInfo, planned_at: int | None, turned: bool = False) -> bool:
        """Whether an existing plan, made at step ``planned_at``, is made again on this call.

        Without known steps only what was observed (``turned``) can say so.
        """
        if turned:
            return True
        if step.step is None or planned_at is None:
            return False
        every = self.method.reuse_rules.every
        if every and step.step >= planned_at + every:
            return True
        return bool(step.steps) and any(planned_at < s <= step.step for s in self.refresh_steps(step.steps or 0))

    def refreshes_later(self, step: StepInfo) -> bool:
        """Whether a later plan may want the log-sum-exp of one that is made now."""
        rules = self.method.reuse_rules
        if not self.needs_lse:
            return False
        if rules.similar or (rules.every and step.step is not None):
            return True
        known = step.step is not None and bool(step.steps)
        return known and any(s > (step.step or 0) for s in self.refresh_steps(step.steps or 0))

    def dense_turn(self, step: StepInfo) -> bool:
        """Whether this is one of the dense steps that ``dense_every`` puts between sparse ones."""
        every = self.method.dense_every
        if not every or step.step is None or not step.steps:
            return False
        after = step.step - self.warmup_steps(step.steps)
        return after >= 0 and (after + 1) % every == 0

    def course(self, steps: int) -> Course:
        """What a layer does over a run of ``steps``."""
        return _course(self, steps)

    def too_late(self, step: StepInfo) -> bool:
        """Whether too few sparse steps follow for a plan from exact mass to pay for itself."""
        if step.step is None or not step.steps or not self.needs_lse:
            return False
        return self.sparse_end(step.steps) - step.step < 2

    def dense_reason(self, step: StepInfo) -> str:
        """Why a call with :attr:`Action.DENSE` is dense."""
        if self.dense_tail(step):
            return "end"
        if self.dense_turn(step):
            return "dense turn"
        warm = step.step is None or not step.steps or step.step < self.warmup_steps(step.steps)
        return "warm-up" if warm else "too few steps are left for a plan to pay"

    def action(self, step: StepInfo, planned: bool, planned_at: int | None, turned: bool = False) -> Action:
        """What to do, for a layer and branch that has a plan or not; ``turned`` says that the plan was found to be old."""
        if self.dense_tail(step) or self.warming(step):
            return Action.DENSE
        if self.dense_turn(step):
            return Action.DENSE
        if not self.method.plans_from_data:
            return Action.SPARSE
        if not planned:
            if self.too_late(step):
                return Action.DENSE
            return Action.DENSE_AND_PLAN if self.plans_densely(step) else Action.PLAN
        if step.step is not None and step.steps and step.step < self.warmup_steps(step.steps):
            return Action.DENSE  # the last warm-up step, planned by another guidance branch
        if not self.refreshes(step, planned_at, turned):
            return Action.SPARSE
        return Action.DENSE_AND_PLAN if self.dense_plans else Action.PLAN

    def progress(self, step: StepInfo) -> float:
        """Share of the run behind the call, 0 where unknown."""
        if step.step is not None and step.steps:
            return step.step / step.steps
        return step.progress if step.progress is not None else 0.0

    def sparse_density(
        self, run_density: float, steps: int, overhead: float = 0.0, planning: float = 0.0, asked: float | None = None
    ) -> float:
        """Density of sparse steps that gives ``run_density`` over a whole run of a layer.

        Args:
            run_density: work over the work of a dense run, planning and pooled keys included.
            steps: denoising steps.
            overhead: work of the pooled remainder on each sparse step.
            planning: work of all plans of the run, in dense steps.
            asked: what to call ``run_density`` in the message, where other layers have taken part of it.

        Raises:
            ValueError: if what is dense and planned costs more.
        """
        dense, sparse, plans = self.course(steps)
        tried = plans if self.compares else 0  # such a plan computes its sparse output once, to compare
        density = (run_density * steps - dense - planning - overhead * (sparse + tried)) / max(sparse + tried, 1)
        if not sparse or density <= 0:
            wanted = run_density if asked is None else asked
            raise ValueError(
                f"run_density={wanted:g} cannot be reached: {dense} of {steps} steps are dense, plans cost as much as "
                f"{planning:.2f} dense steps and the remainder {overhead:.3f} of each sparse one; lower warmup or raise it"
            )
        return min(density, 1.0)


def _walk(policy: Policy, steps: int) -> Iterator[tuple[StepInfo, Action]]:
    """Go through a run of one layer, similarity aside."""
    planned_at: int | None = None
    for i in range(steps):
        step = StepInfo(step=i, steps=steps)
        action = policy.action(step, planned_at is not None, planned_at)
        if action in (Action.PLAN, Action.DENSE_AND_PLAN):
            planned_at = i
        yield step, action


@lru_cache(maxsize=256)
def _mean_density(policy: Policy, steps: int) -> float:
    """Mean density of the sparse steps of a run under a density that falls from plan to plan."""
    current, found = 0.0, []
    for step, action in _walk(policy, steps):
        if action in (Action.PLAN, Action.DENSE_AND_PLAN):
            current = policy.density(step) or 0.0
        if action in (Action.PLAN, Action.SPARSE):
            found.append(current)
    return sum(found) / max(len(found), 1)


@lru_cache(maxsize=256)
def _course(policy: Policy, steps: int) -> Course:
    """Count what a layer does over a run."""
    actions = [action for _, action in _walk(policy, steps)]
    dense = sum(action in (Action.DENSE, Action.DENSE_AND_PLAN) for action in actions)
    plans = sum(action in (Action.PLAN, Action.DENSE_AND_PLAN) for action in actions)
    return Course(dense, steps - dense, plans)
