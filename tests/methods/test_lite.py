"""LiteAttention: distance from the running maximum, and a list of skipped blocks that only grows."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from dit_accel.presets import get_method
from tests.methods._scored import (
    HUNYUAN,
    SMALL,
    context,
    inputs,
    masked_attention,
    natural,
    plan,
    run,
    scores,
    token_mask,
)

BLOCK = 16
SIZES = {"block_q": BLOCK, "block_k": BLOCK}


def _oracle(q: torch.Tensor, k: torch.Tensor, skipped: torch.Tensor) -> torch.Tensor:
    """Largest distance of each block from the running maximum of one head, by loops over rows."""
    count = -(-len(q) // BLOCK)
    found = torch.full((count, count), -math.inf)
    for r, row in enumerate(q):
        i, running = r // BLOCK, -math.inf
        for j in range(count):
            if skipped[i, j]:
                continue
            local = float((k[j * BLOCK : (j + 1) * BLOCK] @ row).max()) / math.sqrt(q.shape[1])
            running = max(running, local)
            found[i, j] = max(float(found[i, j]), local - running)
    return found


@pytest.mark.parametrize("threshold", [-1.0, -3.0, 0.0])
def test_blocks_below_the_threshold_are_skipped_and_stay_so(threshold: float) -> None:
    method = get_method("lite").replace(select=f"threshold:{threshold}", **SIZES)
    memory: dict[str, Any] = {}
    skipped = torch.zeros(1, 3, 13, 13, dtype=torch.bool)
    for step in range(4):
        q, k, v = inputs(SMALL, seed=20 + step)  # another step's queries and keys
        ctx = context(method, q, k, v, SMALL)
        levels = plan(method, q, k, v, SMALL, memory=memory).mask.levels()
        for head in range(3):
            gap = _oracle(q[0, head], k[0, head], skipped[0, head])
            kept = gap >= threshold - 1e-5
            kept |= ctx.forced.cols | ctx.forced.rows[:, None]
            assert torch.equal(levels[0, head] > 0, kept & ~skipped[0, head])
        assert not ((levels > 0) & skipped).any()
        assert ((levels == 0) & ~skipped).any() or step > 0
        skipped = levels == 0
    assert 0.05 < float(skipped.float().mean()) < 0.95


def test_what_a_skipped_block_holds_is_not_looked_at() -> None:
    """Keys that every query of a head skips are poisoned: neither the next plan nor the output changes."""
    method = get_method("lite").replace(select="threshold:-1", order=("gilbert",), **SIZES)
    q, k, v = inputs(HUNYUAN, seed=3)
    q2, k2, v2 = inputs(HUNYUAN, seed=4)
    clean_memory: dict[str, Any] = {}
    memory: dict[str, Any] = {}
    first = plan(method, q, k, v, HUNYUAN, memory=clean_memory)
    plan(method, q, k, v, HUNYUAN, memory=memory)
    clean = plan(method, q2, k2, v2, HUNYUAN, memory=clean_memory)
    visible = natural(first, token_mask(first, k))
    assert first.order is not None
    for head in range(3):
        # poison what one row of blocks skips: its row of the next plan and its output stay as they are
        row = int((first.mask.levels()[0, head] == 0).sum(-1).argmax())
        tokens = first.order.table[0, row * BLOCK : (row + 1) * BLOCK].long()
        hidden = ~visible[0, head][tokens].any(0)
        assert hidden.any()
        k3, v3 = k2.clone(), v2.clone()
        k3[0, head, hidden], v3[0, head, hidden] = float("nan"), float("nan")
        again = plan(method, q2, k3, v3, HUNYUAN, memory=dict(memory))
        assert torch.equal(again.mask.levels()[0, head, row], clean.mask.levels()[0, head, row])
        assert torch.equal(run(again, q2, k3, v3)[0, head, tokens], run(clean, q2, k2, v2)[0, head, tokens])


def test_the_list_stays_where_a_density_is_asked_for() -> None:
    method = get_method("lite").replace(density=0.3, block_q=32, block_k=32)
    memory: dict[str, Any] = {}
    last = torch.ones(1, dtype=torch.uint8)
    for step in range(3):
        q, k, v = inputs(HUNYUAN, seed=30 + step)
        made = plan(method, q, k, v, HUNYUAN, memory=memory)
        levels = made.mask.levels()
        assert (levels <= last).all()
        assert float(made.density.mean()) == pytest.approx(0.3, abs=0.03)
        last = levels
    out, seen = run(made, q, k, v), natural(made, token_mask(made, k))
    torch.testing.assert_close(out, masked_attention(q, k, v, seen), atol=2e-5, rtol=2e-5)


def test_a_falling_density_shrinks_and_a_rising_one_is_refused() -> None:
    method = get_method("lite").replace(density=(0.6, 0.2), block_q=32, block_k=32)
    q, k, v = inputs(HUNYUAN)
    memory: dict[str, Any] = {}
    levels = [plan(method, q, k, v, HUNYUAN, memory=memory, density=d).mask.levels() for d in (0.6, 0.4, 0.2)]
    for before, after in pairwise(levels):
        assert (after <= before).all()
        assert after.sum() < before.sum()
    with pytest.raises(ValueError, match="the density was 0.2 and must not rise, got 0.5"):
        plan(method, q, k, v, HUNYUAN, memory=memory, density=0.5)


def test_a_threshold_that_would_bring_blocks_back_is_refused() -> None:
    q, k, v = inputs(SMALL)
    with pytest.raises(ValueError, match="must be above -100, got -200"):
        scores("lite", q, k, v, SMALL, select="threshold:-200")
