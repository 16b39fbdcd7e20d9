"""Levels of a pyramid against loops over rows and a softmax over pooled keys in float64 (arXiv 2512.04025)."""

from __future__ import annotations

import math

import pytest
import torch
from problems import VIDEO, make_plan, qkv, run
from torch import Tensor

from dit_accel.selection import Forced, level_share, select

NONE = Forced.of(torch.zeros(6, dtype=torch.bool), torch.zeros(20, dtype=torch.bool), "cpu")


def _scores(seed: int) -> Tensor:
    return torch.randn(1, 2, 6, 20, generator=torch.Generator().manual_seed(seed)).mul(2).softmax(-1)


def test_energy_levels_follow_the_summed_score() -> None:
    scores = _scores(0)
    levels, _ = select("levels_energy:0.4,0.5,0.6,0.8", scores, None, NONE)
    for row, found in zip(scores.flatten(0, 2), levels.flatten(0, 2), strict=True):
        before = 0.0
        for block in row.argsort(descending=True).tolist():
            share = before / float(row.sum())
            wanted = next((n for n, end in ((1, 0.4), (2, 0.5), (4, 0.6), (8, 0.8)) if share < end), 0)
            assert int(found[block]) == wanted
            before += float(row[block])


def test_rank_levels_follow_the_rank() -> None:
    scores = _scores(1)
    levels, _ = select("levels_rank:0.1,0.2,0.3,0.5", scores, None, NONE)
    ranked = levels.gather(-1, scores.argsort(-1, descending=True))
    assert ranked.unique(dim=2).shape[2] == 1
    assert ranked[0, 0, 0].tolist() == [1] * 2 + [2] * 2 + [4] * 2 + [8] * 4 + [0] * 10
    assert float(level_share(levels)) == pytest.approx((2 + 2 / 2 + 2 / 4 + 4 / 8) / 20)


@pytest.mark.parametrize("rule", ["levels_energy", "levels_rank"])
@pytest.mark.parametrize("density", [0.15, 0.3, 0.6])
def test_a_density_scales_the_bounds(rule: str, density: float) -> None:
    levels, _ = select(rule, _scores(2), density, NONE)
    assert density - 0.05 < float(level_share(levels)) <= density + 1e-6


@pytest.mark.parametrize("bad", ["0,0.1,0.2,0.3", "0.5,0.4,0.6,0.8", "0.1,0.2,0.3,1.5"])
def test_bounds_must_rise(bad: str) -> None:
    with pytest.raises(ValueError, match="bounds of levels must rise"):
        select(f"levels_rank:{bad}", _scores(0), None, NONE)


def test_output_is_a_softmax_over_pooled_keys() -> None:
    tensors = qkv(VIDEO)
    plan = make_plan("psa", VIDEO, tensors, density=0.3)
    assert plan.order is not None
    assert plan.gather is not None
    table = plan.order.table[0].long()
    q, k, v = (x[0][:, table].double() for x in tensors)
    exact = plan.mask.levels()[0]
    out = run(plan, tensors)[0][:, table]
    share = torch.as_tensor(plan.gathered_density)
    gathered = plan.gather.keys(tensors[1][:, :, table], tensors[2][:, :, table], None)
    checked = 0
    for head in range(q.shape[0]):
        for row in range(exact.shape[1]):
            keys, values, bias = [], [], []
            for block in range(exact.shape[2]):
                if exact[head, row, block]:
                    part = slice(block * 64, min(block * 64 + 64, VIDEO.tokens))
                    keys.append(k[head, part])
                    values.append(v[head, part])
                    bias.append(torch.zeros(keys[-1].shape[0], dtype=torch.float64))
            start = int(gathered.row_start[0, head, row])
            for group in gathered.indices[start : start + int(gathered.count[0, head, row])].tolist():
                level, block, piece = _place(group, exact.shape[2])
                for run_start in range(8):
                    first = block * 64 + (piece * 8 + run_start) * level
                    last = min(first + level, VIDEO.tokens)
                    if first < last:
                        keys.append(k[head, first:last].mean(0, keepdim=True))
                        values.append(v[head, first:last].mean(0, keepdim=True))
                        bias.append(torch.tensor([math.log(last - first)], dtype=torch.float64))
                        checked += 1
            rows = slice(row * 64, min(row * 64 + 64, VIDEO.tokens))
            logits = q[head, rows] @ torch.cat(keys).T / 32**0.5 + torch.cat(bias)
            wanted = logits.softmax(-1) @ torch.cat(values)
            torch.testing.assert_close(out[head, rows].double(), wanted, atol=2e-4, rtol=1e-3)
    assert checked
    assert float(share.mean()) > 0


def _place(group: int, blocks: int) -> tuple[int, int, int]:
    """Level, block and piece of a group of 8 pooled keys: level 2 has four groups a block, level 4 two, level 8 one."""
    for level in (2, 4, 8):
        each = 8 // level
        if group < blocks * each:
            return level, group // each, group % each
        group -= blocks * each
    raise AssertionError(group)
