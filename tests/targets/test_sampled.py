"""A few rows are chosen as among all of them."""

from __future__ import annotations

import pytest
import torch

import dit_accel.targets.sampled
from dit_accel.selection import Forced, select
from dit_accel.targets.sampled import sampled_levels

DENSITIES = (0.05, 0.3, 0.7)
ROWS = torch.tensor([0, 3, 7])


def _forced(text: bool) -> Forced:
    rows, cols = torch.zeros(10, dtype=torch.bool), torch.zeros(17, dtype=torch.bool)
    rows[-1], cols[-1] = text, text
    return Forced.of(rows, cols, "cpu")


@pytest.mark.parametrize("rule", ["top_k", "top_k_head", "top_k_layer", "top_p", "top_k_adaptive", "top_k:0.4"])
@pytest.mark.parametrize("text", [False, True])
def test_rows_are_those_of_the_whole(rule: str, text: bool) -> None:
    scores, forced = torch.rand(2, 3, 10, 17).softmax(-1), _forced(text)
    for density, found in zip(DENSITIES, sampled_levels(rule, scores, DENSITIES, forced, ROWS), strict=True):
        wanted = select(rule, scores, density, forced)[0].index_select(2, ROWS)
        assert torch.equal(found, wanted)


def test_blocks_that_a_score_insists_on_are_kept() -> None:
    scores, insist = torch.rand(1, 3, 10, 17), torch.zeros(1, 3, 10, 17, dtype=torch.bool)
    insist[0, 1, 3] = True
    found = sampled_levels("top_k", scores, (0.1,), _forced(False), ROWS, insist)[0]
    assert found[0, 1, 1].all()
    assert not found[0, 1, 0].all()


def test_of_many_scores_a_part_stands_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, forced = torch.rand(1, 2, 10, 17), _forced(False)
    monkeypatch.setattr(dit_accel.targets.sampled, "_MOST_SORTED", 40)
    found = sampled_levels("top_k_head", scores, (0.5,), forced, torch.arange(10))[0]
    assert float(found.float().mean()) == pytest.approx(0.5, abs=0.15)


def test_scores_that_are_not_finite_count_as_the_least() -> None:
    scores = torch.rand(1, 1, 10, 17) + 1
    scores[0, 0, 3, 4] = torch.nan
    for rule in ("top_k", "top_k_head"):
        assert not sampled_levels(rule, scores, (0.9,), _forced(False), ROWS)[0][0, 0, 1, 4]
