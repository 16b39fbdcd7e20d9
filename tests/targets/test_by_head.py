"""One density for each head, under every rule."""

from __future__ import annotations

import pytest
import torch

from dit_accel.selection import Forced, select
from dit_accel.targets.by_head import select_by_head

RULES = ("top_k", "top_k_head", "top_p", "threshold", "top_k:0.3")


def _forced(rows: int, cols: int, *, row: bool, col: bool) -> Forced:
    forced_rows, forced_cols = torch.zeros(rows, dtype=torch.bool), torch.zeros(cols, dtype=torch.bool)
    forced_rows[-1], forced_cols[0] = row, col
    return Forced.of(forced_rows, forced_cols, "cpu")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("text", [False, True])
def test_each_head_is_chosen_as_if_it_were_alone(rule: str, text: bool) -> None:
    scores = torch.rand(2, 4, 9, 17).softmax(-1)
    forced = _forced(9, 17, row=text, col=text)
    density = torch.tensor([0.1, 0.4, 0.4, 0.9])
    levels, bound = select_by_head(rule, scores, density, forced)
    for head, share in enumerate(density.tolist()):
        wanted, _ = select(rule, scores[:, head : head + 1], share, forced)
        if rule in ("top_k", "top_k_head", "top_k:0.3"):
            torch.testing.assert_close(levels[:, head : head + 1], wanted)
        else:  # found by bisection over the heads that share a density
            assert abs(float(levels[:, head].float().mean() - wanted.float().mean())) < 0.1
    assert bound is None or bound >= int((levels > 0).sum())


def test_equal_densities_are_what_select_does() -> None:
    scores, forced = torch.rand(1, 3, 8, 8), _forced(8, 8, row=False, col=False)
    found = select_by_head("top_k", scores, torch.full((3,), 0.5), forced)
    wanted = select("top_k", scores, 0.5, forced)
    torch.testing.assert_close(found[0], wanted[0])
    assert found[1] == wanted[1]


def test_blocks_that_a_score_insists_on_stay() -> None:
    scores, forced = torch.rand(1, 3, 8, 8), _forced(8, 8, row=False, col=False)
    insist = torch.zeros(1, 3, 8, 8, dtype=torch.bool)
    insist[0, 1, 2, 5] = True
    low, density = scores.masked_fill(insist, -1), torch.tensor([0.2, 0.3, 0.4])
    levels, _ = select_by_head("top_k", low, density, forced, insist=insist)
    assert levels[0, 1, 2, 5] == 1


def test_no_row_is_empty_at_the_smallest_density() -> None:
    scores, forced = torch.rand(1, 2, 8, 8), _forced(8, 8, row=False, col=False)
    for rule in RULES:
        levels, _ = select_by_head(rule, scores, torch.tensor([0.001, 0.5]), forced)
        assert (levels > 0).any(-1).all()


def test_another_number_of_densities_raises() -> None:
    with pytest.raises(ValueError, match="one density for each of 3 heads"):
        select_by_head("top_k", torch.rand(1, 3, 4, 4), torch.tensor([0.1, 0.2]), _forced(4, 4, row=False, col=False))
