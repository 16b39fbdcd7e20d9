"""AnchorAttention: columns by their distance from the anchor, gathered key by key."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dit_accel.geometry import TokenGeometry
from dit_accel.presets import get_method
from tests.methods._scored import HUNYUAN, inputs, masked_attention, plan, run, token_mask

BLOCK = 16
SIZES = {"block_q": BLOCK, "block_k": BLOCK}
TEXT = TokenGeometry((3, 12, 15), suffix=20)


def _oracle(q: Tensor, k: Tensor, geometry: TokenGeometry, theta: float, span: int) -> Tensor:
    """Which keys each query of one head sees, by loops over blocks."""
    tokens, dim = q.shape
    count = -(-tokens // BLOCK)
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    text = torch.ones(tokens, dtype=torch.bool)
    text[geometry.visual_slice] = False
    text_blocks = [bool(text[i * BLOCK : (i + 1) * BLOCK].any()) for i in range(count)]
    for first in range(0, count, span):
        members = range(first, min(first + span, count))
        exact = torch.zeros(tokens, dtype=torch.bool)
        exact[:BLOCK] = True
        exact[first * BLOCK : (first + span) * BLOCK] = True
        chosen = torch.zeros(tokens, dtype=torch.bool)
        for i in members:
            if text_blocks[i]:
                continue
            rows = q[i * BLOCK : (i + 1) * BLOCK]
            anchor = (rows @ k[exact].T / math.sqrt(dim)).amax(1).mean()
            chosen |= rows.mean(0) @ k.T / math.sqrt(dim) + theta >= anchor
        for i in members:
            mine = exact | chosen
            for j in range(count):
                if text_blocks[j] or text_blocks[i]:
                    mine[j * BLOCK : (j + 1) * BLOCK] = True
            seen[i * BLOCK : (i + 1) * BLOCK] = mine
    return seen


@pytest.mark.parametrize("theta", [-2.0, 0.0, 2.0])
@pytest.mark.parametrize("step", [1, 3])
def test_columns_follow_the_formula(theta: float, step: int) -> None:
    q, k, v = inputs(TEXT, heads=2)
    method = get_method("anchor").replace(score=f"stripes:theta={theta},step={step}", **SIZES)
    made = plan(method, q, k, v, TEXT)
    got = token_mask(made, k)
    span = min(step, 560 // BLOCK // 16)
    for head in range(2):
        assert torch.equal(got[0, head], _oracle(q[0, head], k[0, head], TEXT, theta, span))
    assert 0.1 < float(got.float().mean()) < 0.9
    torch.testing.assert_close(run(made, q, k, v), masked_attention(q, k, v, got), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("density", [0.5, 0.3, 0.2])
def test_theta_is_searched_for_a_density(density: float) -> None:
    """Work is within one key of each span of the density, and one threshold serves all heads."""
    q, k, v = inputs(HUNYUAN, seed=4)
    made = plan(get_method("anchor").replace(density=density, **SIZES), q, k, v, HUNYUAN)
    work = made.density + made.gathered_density
    assert float(work.mean()) == pytest.approx(density, abs=2e-3)
    assert float(work.std()) > 1e-3
    torch.testing.assert_close(work, token_mask(made, k).float().mean((2, 3)))


def test_long_spans_share_their_lists() -> None:
    geometry = TokenGeometry((4, 32, 32), suffix=50)
    q, k, v = inputs(geometry, heads=2, dim=16)
    method = get_method("anchor").replace(score="stripes:theta=1,step=16", **SIZES)
    made = plan(method, q, k, v, geometry)
    assert made.gather is not None
    found = made.gather.keys(k, v, None)
    blocks = made.mask.levels().shape[2]
    span = blocks // 16
    assert span == 16
    start = found.row_start[0, 0]
    assert torch.equal(start, start[torch.arange(blocks) // span * span])
    seen = token_mask(made, k)
    assert (made.mask.levels()[0, 0, 0, :span] == 1).all()
    torch.testing.assert_close(run(made, q, k, v), masked_attention(q, k, v, seen), atol=2e-5, rtol=2e-5)


def test_keys_that_are_not_listed_are_not_read() -> None:
    q, k, v = inputs(TEXT, heads=2)
    made = plan(get_method("anchor").replace(score="stripes:0.0", **SIZES), q, k, v, TEXT)
    clean, seen = run(made, q, k, v), token_mask(made, k)
    for head in range(2):
        for i in (0, 4, 9):
            hidden = ~seen[0, head, i * BLOCK]
            assert hidden.any()
            k2, v2 = k.clone(), v.clone()
            k2[:, head, hidden], v2[:, head, hidden] = float("nan"), float("nan")
            rows = slice(i * BLOCK, (i + 1) * BLOCK)
            assert torch.equal(run(made, q, k2, v2)[:, head, rows], clean[:, head, rows])


def test_what_would_count_keys_twice_is_refused() -> None:
    q, k, v = inputs(TEXT, heads=2)
    for changes in ({"select": "top_k", "density": 0.3}, {"compensate": "mean"}):
        with pytest.raises(ValueError, match="gathers keys itself"):
            plan(get_method("anchor").replace(**changes), q, k, v, TEXT)


def test_a_density_may_be_asked_for() -> None:
    method = get_method("anchor")
    assert method.keeps_density
    assert method.density is None
    assert not method.replace(score="none").keeps_density
