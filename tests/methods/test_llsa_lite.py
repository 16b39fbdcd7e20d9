"""Hierarchical choice and pooled ancestors against loops (arXiv 2512.16615)."""

from __future__ import annotations

import math

import pytest
import torch
from problems import HUNYUAN, make_plan, qkv, run

from dit_accel.geometry import TokenGeometry
from dit_accel.score.hierarchical import hierarchical_choice


def test_children_are_chosen_inside_chosen_parents() -> None:
    gen = torch.Generator().manual_seed(0)
    fine, coarse = torch.randn(1, 2, 3, 22, generator=gen), torch.randn(1, 2, 3, 6, generator=gen)
    exact, parents = hierarchical_choice(fine, coarse, 4, 0.2)
    keep = round(0.2 * 22)
    for f, c, e, p in zip(*(x.flatten(0, 2) for x in (fine, coarse, exact, parents)), strict=True):
        wide = math.ceil(2 * keep / 4)
        chosen = sorted(range(6), key=lambda j: -float(c[j]))[:wide]
        assert set(p.nonzero()[:, 0].tolist()) == set(chosen)
        inside = [j for j in range(22) if j // 4 in chosen]
        assert set(e.nonzero()[:, 0].tolist()) == set(sorted(inside, key=lambda j: -float(f[j]))[:keep])


@pytest.mark.parametrize("geometry", [HUNYUAN, TokenGeometry((8, 12, 14))], ids=str)
def test_every_token_is_counted_once(geometry: TokenGeometry) -> None:
    """Equal keys everywhere: the output is the mean of all values, whatever is pooled."""
    q, k, v = qkv(geometry)
    k = torch.ones_like(k)
    plan = make_plan("llsa_lite", geometry, (q, k, v), density=0.2)
    assert plan.gather is not None
    wanted = v.mean(2, keepdim=True).expand_as(v)
    torch.testing.assert_close(run(plan, (q, k, v)), wanted, atol=1e-4, rtol=1e-3)


def test_children_must_be_two_or_more() -> None:
    with pytest.raises(ValueError, match="children must be a number of blocks, at least 2, got 1"):
        make_plan("llsa_lite", HUNYUAN, qkv(HUNYUAN), score="hierarchical:1")
