"""The error that was asked for is kept where plans are made."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from problem import Problem
from torch import Tensor

from dit_accel.adapter import StepInfo
from dit_accel.compensate import COMPENSATIONS
from dit_accel.context import PlanContext
from dit_accel.method import Method
from dit_accel.plan import execute
from dit_accel.planner import Planner
from dit_accel.score import Scores
from dit_accel.selection import Forced, select
from dit_accel.targets.control import ErrorControl
from dit_accel.targets.probe import Probe, measure_at, why_not_probed

TARGETS = (0.3, 0.05)


def _method(**changes: object) -> Method:
    base = {
        "order": "axes",
        "order_choice": "recall",
        "score": "mass",
        "select": "top_k",
        "density": 0.2,
        "compensate": "mean",
    }
    return Method(name="trial", **{**base, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(("compensate", "dense"), [("mean", True), ("mean", False), ("drop", True)])
def test_the_error_is_near_the_target_and_the_work_falls_with_it(
    problem: Problem, compensate: str, dense: bool
) -> None:
    planner = Planner(_method(compensate=compensate))
    densities = []
    for target in TARGETS:
        ctx = problem.context(planner, dense=dense)
        ctx.control = ErrorControl(target, backend="reference")
        error, density = problem.error_of(planner, ctx)
        assert 0.3 * target < error < 1.3 * target
        densities.append(density)
    assert densities == sorted(densities)
    assert densities[0] < 0.3


def test_easy_heads_pay_for_hard_ones(problem: Problem) -> None:
    """Less work than the least density that every head could share for the same error."""
    planner = Planner(_method())
    ctx = problem.context(planner)
    ctx.control = ErrorControl(0.05, backend="reference")
    error, density = problem.error_of(planner, ctx)
    uniform = []
    for share in (0.3, 0.4, 0.45, 0.5, 0.6):
        plain = problem.context(planner)
        plain.density = share
        uniform.append((problem.error_of(planner, plain)[0], share))
    assert density < min(share for found, share in uniform if found <= error)


@pytest.mark.parametrize("select_rule", ["top_k_layer", "top_p", "top_k_head"])
def test_rules_that_spread_a_budget_get_one_density(problem: Problem, select_rule: str) -> None:
    planner = Planner(_method().replace(select=select_rule, density=0.2))
    ctx = problem.context(planner)
    ctx.control = ErrorControl(0.1, backend="reference")
    error, density = problem.error_of(planner, ctx)
    assert 0.02 < error < 0.2
    assert 0.05 < density < 0.7


PROBED = [entry.name for entry in COMPENSATIONS if not why_not_probed(_method(compensate=entry.name))]


class _Taking:
    """Takes what a control is given."""

    def __init__(self) -> None:
        self.seen: list[tuple[Planner, PlanContext, tuple[str, ...], Scores]] = []

    def join(self, layers: Sequence[str]) -> None: ...

    def begin(self, geometry: object) -> list[str]:
        return []

    def head_orders(self, *_: object) -> None: ...

    def shares(self, *given: object) -> None:
        self.seen.append(given)  # type: ignore[arg-type]


@pytest.mark.parametrize("compensate", PROBED)
@pytest.mark.parametrize("masked", [False, True])
def test_a_sample_is_part_of_the_whole(problem: Problem, compensate: str, masked: bool) -> None:
    """Sampled errors are those of the same rows of the plan that the engine makes."""
    planner = Planner(_method(compensate=compensate))
    valid = None
    if masked:
        valid = torch.ones(1, problem.geometry.tokens, dtype=torch.bool)
        valid[:, -7:] = False
    ctx = problem.context(planner, key_valid=valid)
    ctx.control = taking = _Taking()
    plan = planner.plan(ctx)
    out = execute(plan, problem.query, problem.key, problem.value, scale=None, key_valid=valid, backend="reference")
    _, seen, names, scores = taking.seen[0]
    probe = Probe.of(seen, names, scores, (0.2,))
    assert probe is not None
    error, size = probe.errors(
        problem.query, problem.key, problem.value, problem.out, scale=None, key_valid=valid, backend="reference"
    )
    rows, wanted = probe.sample.rows(out), probe.sample.rows(problem.out)
    torch.testing.assert_close(error[0], (rows - wanted).square().sum((0, 2, 3)), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(size, wanted.square().sum((0, 2, 3)))


def test_text_rows_are_no_part_of_the_sample(problem: Problem) -> None:
    planner = Planner(_method())
    ctx = problem.context(planner)
    ctx.control = taking = _Taking()
    planner.plan(ctx)
    _, seen, names, scores = taking.seen[0]
    probe = Probe.of(seen, names, scores, (0.2,))
    assert probe is not None
    assert int(probe.sample.tokens.max()) < problem.geometry.visual
    assert not seen.forced.rows[probe.sample.blocks].any()


def test_measuring_is_counted_as_work(problem: Problem) -> None:
    planner = Planner(_method())
    plain, controlled = problem.context(planner), problem.context(planner)
    controlled.control = ErrorControl(0.1, backend="reference")
    before, after = planner.plan(plain).cost, planner.plan(controlled).cost
    assert 0.1 < after - before < 1.0


def test_the_target_rises_as_the_density_of_the_method_falls(problem: Problem) -> None:
    planner = Planner(_method(density=(0.6, 0.2), warmup=0.0, refresh=(0.5,)))
    ctx = problem.context(planner)
    control = ErrorControl(0.1)
    found = []
    for step in (0, 5):
        ctx.step = StepInfo(step=step, steps=10)
        found.append(control.error_at(ctx))
    assert found == pytest.approx([0.1 * 0.4 / 0.6, 0.1 * 0.4 / 0.2])
    assert control.error_at(problem.context(Planner(_method()))) == 0.1


def test_nothing_to_sample_leaves_the_density(problem: Problem) -> None:
    planner = Planner(_method())
    ctx = problem.context(planner)
    every = Forced.of(torch.ones(25, dtype=torch.bool), torch.zeros(25, dtype=torch.bool), "cpu")
    ctx.forced = every
    scores = Scores(torch.rand(1, 4, 25, 25))
    assert measure_at(ctx, ("fhw",), scores) is None
    assert ErrorControl(0.1).shares(planner, ctx, ("fhw",), scores) is None


def test_scores_that_are_not_finite_keep_everything(problem: Problem) -> None:
    planner = Planner(_method())
    broken = problem._replace(value=problem.value.clone())
    broken.value[0, 1, 100] = torch.nan
    ctx = broken.context(planner)
    ctx.dense_out = broken.value
    ctx.control = ErrorControl(0.1, backend="reference")
    assert float(planner.plan(ctx).density.min()) == 1.0


@pytest.mark.parametrize("error", [0, 1, -0.1, 2.0, float("nan"), "0.1", True])
def test_bad_errors_raise(error: object) -> None:
    with pytest.raises(ValueError, match="target_error must be above 0 and below 1"):
        ErrorControl(error)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"score": "window", "window": 3, "compensate": "drop"}, "is a pattern"),
        ({"select": "all"}, "has no density"),
        ({"compensate": "residual"}, "keeps something for every row"),
        ({"order": "kmeans", "order_choice": "fixed"}, "depends on the tokens"),
    ],
)
def test_methods_that_cannot_be_controlled_say_why(changes: dict[str, object], reason: str) -> None:
    changes = {"order": "raster", "order_choice": "fixed", **changes}
    assert reason in str(ErrorControl.why_not(_method(**changes)))


def test_the_rule_of_the_engine_is_unchanged_without_a_control(problem: Problem) -> None:
    planner = Planner(_method())
    plan = planner.plan(problem.context(planner))
    scores: Tensor = torch.rand(1, 4, 25, 25)
    assert select("top_k", scores, 0.2, problem.context(planner).forced)[1] is not None
    assert float(plan.density.mean()) == pytest.approx(0.2, abs=0.08)
