"""Schedules: when a layer is dense, plans and is sparse."""

from __future__ import annotations

import pytest

from dit_accel.adapter import StepInfo
from dit_accel.method import Method
from dit_accel.policy import Action, Policy
from dit_accel.presets import get_method


def _run(method: Method, steps: int) -> list[Action]:
    """Actions of one layer over a run with known steps."""
    policy, planned_at, actions = Policy(method), None, []
    for i in range(steps):
        step = StepInfo(step=i, steps=steps)
        action = policy.action(step, planned_at is not None, planned_at)
        if action in (Action.PLAN, Action.DENSE_AND_PLAN):
            planned_at = i
        actions.append(action)
    return actions


def test_adaspa_searches_at_the_last_warm_up_step_and_again_at_step_thirty() -> None:
    actions = _run(get_method("adaspa"), 50)
    assert actions[:9] == [Action.DENSE] * 9
    assert actions[9] is Action.DENSE_AND_PLAN
    assert actions[30] is Action.PLAN
    assert [i for i, a in enumerate(actions) if a is not Action.SPARSE] == [*range(10), 30]


def test_few_steps_without_warm_up_have_no_dense_step() -> None:
    actions = _run(get_method("union").replace(warmup=0.0), 4)
    assert actions == [Action.PLAN, Action.SPARSE, Action.SPARSE, Action.SPARSE]


def test_geometry_needs_no_planning_step() -> None:
    actions = _run(get_method("gna").replace(warmup=0.1), 20)
    assert actions == [Action.DENSE] * 2 + [Action.SPARSE] * 18


def test_end_share_is_dense_again() -> None:
    actions = _run(get_method("union").replace(end=0.9), 20)
    assert actions[18:] == [Action.DENSE, Action.DENSE]
    assert actions[17] is Action.SPARSE


def test_a_falling_density_refreshes_twice_by_itself() -> None:
    policy = Policy(Method(name="x", density=(0.5, 0.2), warmup=0.1))
    assert policy.refresh_steps(30) == (12, 21)


def test_without_steps_the_progress_decides() -> None:
    policy = Policy(get_method("union"))
    assert policy.action(StepInfo(progress=0.1), False, None) is Action.DENSE
    assert policy.action(StepInfo(progress=0.25), False, None) is Action.DENSE_AND_PLAN
    assert policy.action(StepInfo(progress=0.3), True, None) is Action.SPARSE


def test_without_any_clock_the_first_call_plans_and_is_sparse() -> None:
    policy = Policy(get_method("union"))
    assert policy.action(StepInfo(), False, None) is Action.PLAN


def test_a_layer_that_missed_the_planning_step_plans_later() -> None:
    """First Block Cache skips layers on some steps."""
    policy = Policy(get_method("union"))
    assert policy.action(StepInfo(step=13, steps=50), False, None) is Action.DENSE_AND_PLAN


def test_run_density_gives_the_density_of_sparse_steps() -> None:
    policy = Policy(get_method("union"))
    density = policy.sparse_density(0.5, 50, overhead=0.03, planning=0.8)
    assert 10 + 40 * (density + 0.03) + 0.8 == pytest.approx(0.5 * 50)
    with pytest.raises(ValueError, match=r"run_density=0.15 cannot be reached: 10 of 50 steps are dense"):
        policy.sparse_density(0.15, 50)
    tail = Policy(get_method("union").replace(end=0.8))
    assert 20 + 30 * tail.sparse_density(0.5, 50) == pytest.approx(0.5 * 50)


def test_a_falling_density_reaches_both_ends() -> None:
    policy = Policy(Method(name="x", density=(0.8, 0.2), warmup=0.1))
    densities = [policy.density(StepInfo(step=step, steps=30)) for step in (2, *policy.refresh_steps(30))]
    assert densities == pytest.approx([0.8, 0.5, 0.2])


def test_no_plan_where_too_few_sparse_steps_follow() -> None:
    assert _run(get_method("union"), 1) == [Action.DENSE]
    assert _run(get_method("union").replace(warmup=1.0), 4) == [Action.DENSE] * 4
    assert _run(get_method("union").replace(warmup=0.0), 2) == [Action.PLAN, Action.SPARSE]
    policy = Policy(get_method("union"))
    assert policy.dense_reason(StepInfo(step=0, steps=1)) in ("warm-up", "too few steps are left for a plan to pay")


def test_a_branch_that_follows_stays_dense_in_the_warm_up() -> None:
    policy = Policy(get_method("union"))
    assert policy.action(StepInfo(step=9, steps=50, branch="uncond"), True, 9) is Action.DENSE
    assert policy.action(StepInfo(step=10, steps=50, branch="uncond"), True, 9) is Action.SPARSE
