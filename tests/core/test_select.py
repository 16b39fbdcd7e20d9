"""Selection rules against loops written from their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dit_accel.selection import SELECTIONS, Forced, level_share, select
from dit_accel.selection.top_k import EASY_RECALL, adaptive_counts

#: Rules of one level; those of a pyramid have tests of their own.
BLOCK_RULES = sorted(name for name in SELECTIONS.names() if not SELECTIONS.trait(name, "levels", False))


def _scores(seed: int, shape: tuple[int, ...] = (2, 3, 7, 9)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(2).softmax(-1)


def _forced(rows: int, cols: int, *, row: int | None = None, col: int | None = None) -> Forced:
    forced_rows, forced_cols = torch.zeros(rows, dtype=torch.bool), torch.zeros(cols, dtype=torch.bool)
    if row is not None:
        forced_rows[row] = True
    if col is not None:
        forced_cols[col] = True
    return Forced.of(forced_rows, forced_cols, torch.device("cpu"))


@settings(max_examples=60, deadline=None)
@given(
    rule=st.sampled_from(BLOCK_RULES),
    seed=st.integers(0, 999),
    density=st.floats(0.02, 1.0),
    row=st.one_of(st.none(), st.integers(0, 6)),
    col=st.one_of(st.none(), st.integers(0, 8)),
)
def test_no_empty_row_forced_blocks_present_capacity_holds(
    rule: str, seed: int, density: float, row: int | None, col: int | None
) -> None:
    forced = _forced(7, 9, row=row, col=col)
    levels, capacity = select(rule, _scores(seed), density, forced)
    assert levels.dtype == torch.uint8
    assert set(levels.unique().tolist()) <= {0, 1}
    assert (levels.sum(-1) >= 1).all()
    if row is not None:
        assert (levels[:, :, row] == 1).all()
    if col is not None:
        assert (levels[..., col] == 1).all()
    if capacity is not None:
        assert int(levels.sum()) <= capacity


def test_top_k_keeps_the_best_of_each_row() -> None:
    scores = _scores(1)
    levels, capacity = select("top_k", scores, 3 / 9, _forced(7, 9))
    expected = torch.zeros_like(levels).scatter_(-1, scores.topk(3).indices, 1)
    assert torch.equal(levels, expected)
    assert capacity == int(levels.sum())


def test_top_p_keeps_the_smallest_prefix_that_reaches_the_mass() -> None:
    scores = _scores(2)
    levels, _ = select("top_p:0.7", scores, None, _forced(7, 9))
    for row_scores, row_levels in zip(scores.flatten(0, 2), levels.flatten(0, 2), strict=True):
        ranked = row_scores.sort(descending=True).values
        wanted = next(n for n in range(1, 10) if ranked[:n].sum() >= 0.7 * row_scores.sum() - 1e-7)
        assert int(row_levels.sum()) == wanted
        assert row_scores[row_levels == 1].min() >= row_scores[row_levels == 0].max() if wanted < 9 else True


def test_top_k_head_spends_one_budget_over_the_head() -> None:
    scores = _scores(3)
    levels, _ = select("top_k_head", scores, 0.3, _forced(7, 9))
    budget = round(0.3 * 63)
    for head_scores, head_levels in zip(scores.flatten(0, 1), levels.flatten(0, 1), strict=True):
        best = set(head_scores.flatten().topk(budget).indices.tolist())
        best |= {r * 9 + int(head_scores[r].argmax()) for r in range(7)}
        assert set(head_levels.flatten().nonzero()[:, 0].tolist()) == best


def test_threshold_keeps_what_reaches_it() -> None:
    scores = _scores(4)
    levels, _ = select("threshold:0.15", scores, None, _forced(7, 9))
    assert (levels[scores >= 0.15] == 1).all()
    kept_below = (levels == 1) & (scores < 0.15)
    assert (kept_below.sum(-1) <= 1).all()


def test_adaspa_budgets_follow_the_paper() -> None:
    """Sparsity 0.8: easy heads 0.9, hard heads 0.7, the others 0.8; the mean stays."""
    rows, cols, heads = 4, 40, 6
    scores = torch.full((1, heads, rows, cols), 1.0 / cols)
    for head in (1, 4):  # nearly all mass in one block: recall above 0.8
        scores[0, head] = 0.02 / (cols - 1)
        scores[0, head, :, 5] = 0.98
    scores[0, 2, :, :8] = 0.04  # 8 of 40 blocks hold 0.32: below 0.8, above the flat heads
    scores[0, 2, :, 8:] = (1 - 0.32) / 32
    counts = adaptive_counts(scores, 0.2)[0].tolist()
    assert [counts[1], counts[4]] == [4, 4]
    assert counts[2] == 8
    assert sorted(counts) == [4, 4, 8, 8, 12, 12]
    assert sum(counts) == heads * 8


def test_adaspa_budgets_when_most_heads_are_easy() -> None:
    scores = torch.zeros(1, 4, 2, 20)
    scores[..., 0] = 1.0
    assert adaptive_counts(scores, 0.2)[0].float().mean() == 4
    assert EASY_RECALL == 0.8


@pytest.mark.parametrize("rule", BLOCK_RULES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_count_as_least(rule: str, bad: float) -> None:
    scores = _scores(5)
    scores[0, 0, 2, 3] = bad
    levels, _ = select(rule, scores, 0.3, _forced(7, 9))
    assert (levels.sum(-1) >= 1).all()
    if rule not in ("all",):
        assert levels[0, 0, 2, 3] == 0


@pytest.mark.parametrize("rule", ["top_p", "threshold"])
@pytest.mark.parametrize("density", [0.25, 0.5, 0.8])
def test_a_density_is_met_by_rules_with_a_strength_of_their_own(rule: str, density: float) -> None:
    scores = _scores(6, (1, 4, 40, 50))
    levels, _ = select(rule, scores, density, _forced(40, 50))
    share = float(level_share(levels))
    assert density - 0.02 < share <= density + 1e-6


def test_a_rule_needs_a_density_or_a_strength() -> None:
    with pytest.raises(ValueError, match=r"'top_p' needs a density, or a strength of its own such as 'top_p:0.9'"):
        select("top_p", _scores(0), None, _forced(7, 9))


def test_insisted_blocks_are_exact() -> None:
    insist = torch.zeros(1, 1, 7, 9, dtype=torch.bool)
    insist[..., 2, 5] = True
    levels, capacity = select("top_k", _scores(1), 1 / 9, _forced(7, 9), insist=insist)
    assert (levels[..., 2, 5] == 1).all()
    assert capacity is None


def test_one_budget_over_the_heads_of_a_layer() -> None:
    scores = _scores(7)
    levels, capacity = select("top_k_layer", scores, 0.2, _forced(7, 9))
    budget = round(0.2 * 3 * 63)
    assert capacity is not None
    for mine, kept in zip(scores, levels, strict=True):
        least = mine.flatten().topk(budget).values.min()
        assert bool((kept[mine >= least] == 1).all())
        assert int(kept.sum()) <= capacity // 2
