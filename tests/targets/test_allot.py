"""Densities by marginal error for work: against a search, and as properties."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dit_accel.targets.allot import FINE, allot_error, allot_work, refine

MEASURED = (0.05, 0.2, 0.5)


def _curves(heads: int, seed: int) -> Tensor:
    """Squared errors ``[D, H]`` that fall with the density, at another pace in each head."""
    gen = torch.Generator().manual_seed(seed)
    pace = torch.rand(heads, generator=gen) * 8 + 1
    return torch.stack([torch.exp(-pace * d) - torch.exp(-pace) for d in MEASURED]).clamp(min=0)


def test_refined_errors_go_through_what_was_measured_and_reach_zero() -> None:
    error = _curves(3, 0)
    fine = refine(MEASURED, error, (0.05, 0.2, 0.35, 0.5, 1.0))
    torch.testing.assert_close(fine[[0, 1, 3]], error)
    torch.testing.assert_close(fine[2].sqrt(), (error[1].sqrt() + error[2].sqrt()) / 2)
    assert not fine[-1].any()


def test_errors_that_rise_with_the_density_are_levelled() -> None:
    fine = refine(MEASURED, torch.tensor([0.04, 0.09, 0.01])[:, None], MEASURED)
    torch.testing.assert_close(fine[:, 0], torch.tensor([0.09, 0.09, 0.01]))


@pytest.mark.parametrize("measured", [(0.5, 0.2), (0.2, 0.2), (0.2, 1.0), (0.0, 0.5)])
def test_bad_densities_raise(measured: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="measured densities must rise from above 0 to below 1"):
        refine(measured, torch.ones(2, 1))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(0, 10_000), st.floats(0.002, 0.8))
def test_the_error_asked_for_is_kept(heads: int, seed: int, target: float) -> None:
    error = refine(MEASURED, _curves(heads, seed))
    weight = torch.rand(heads, generator=torch.Generator().manual_seed(seed + 1)) + 0.01
    weight = weight / weight.sum()
    found = allot_error(error, weight, target)
    index = [FINE.index(round(d, 4)) for d in found.tolist()]
    assert float((error[index, torch.arange(heads)] * weight).sum()) <= target**2 * (1 + 1e-5)


def test_no_cheaper_choice_keeps_the_error() -> None:
    """Against every combination of a coarse grid: a Lagrangian is optimal up to one step of one head."""
    error = refine(MEASURED, _curves(3, 4))
    weight = torch.full((3,), 1 / 3)
    coarse = range(0, len(FINE), 6)
    fine = torch.tensor(FINE)
    for target in (0.1, 0.2, 0.4):
        costs = [
            float(fine[list(pick)].mean())
            for pick in itertools.product(coarse, repeat=3)
            if float((error[list(pick), torch.arange(3)] * weight).sum()) <= target**2
        ]
        assert float(allot_error(error, weight, target).mean()) <= min(costs) + 0.02


def test_what_cannot_be_kept_is_dense() -> None:
    flat = refine(MEASURED, torch.ones(3, 2))
    assert allot_error(flat, torch.full((2,), 0.5), 1e-9).tolist() == [1.0, 1.0]


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 12), st.integers(0, 10_000), st.floats(0.03, 0.95))
def test_the_budget_is_met(heads: int, seed: int, budget: float) -> None:
    error = refine(MEASURED, _curves(heads, seed))
    found = allot_work(error, torch.full((heads,), 1 / heads), budget)
    assert float(found.mean()) == pytest.approx(budget, rel=0.02)
    assert float(found.min()) >= 0.01 - 1e-6
    assert float(found.max()) <= 1


def test_a_hard_head_gets_more_than_an_easy_one() -> None:
    hard_easy = torch.tensor([[0.5, 0.01], [0.3, 0.001], [0.1, 0.0001]])
    found = allot_work(refine(MEASURED, hard_easy), torch.full((2,), 0.5), 0.3)
    assert found[0] > 2 * found[1]


@pytest.mark.parametrize("budget", [0.0, 1.5, -1.0])
def test_bad_budgets_raise(budget: float) -> None:
    with pytest.raises(ValueError, match="the budget must be above 0 and at most 1"):
        allot_work(refine(MEASURED, torch.ones(3, 1)), torch.ones(1), budget)
