"""SpargeAttn: self-similarity gate and cumulative selection, against loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dit_accel.presets import get_method
from tests.methods._scored import HUNYUAN, SMALL, context, inputs, plan, scores

BLOCKS = {"block_q": 32, "block_k": 16}


def _blocks(x: Tensor, size: int) -> list[Tensor]:
    return [x[s : s + size] for s in range(0, len(x), size)]


def _similarity(block: Tensor) -> float:
    """Mean cosine of all pairs of rows, the pair of a row with itself included."""
    pairs = torch.cosine_similarity(block[:, None], block[None], dim=-1)
    return float(pairs.sum()) / len(block) ** 2


def _oracle(q: Tensor, k: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Scores and kept blocks of one head."""
    k = k - k.mean(0)
    q_blocks, k_blocks = _blocks(q, 32), _blocks(k, 16)
    alike_q = [_similarity(b) >= threshold for b in q_blocks]
    alike_k = [_similarity(b) >= threshold for b in k_blocks]
    values = torch.zeros(len(q_blocks), len(k_blocks))
    for i, block in enumerate(q_blocks):
        logits = [float(block.mean(0) @ other.mean(0)) / math.sqrt(q.shape[1]) for other in k_blocks]
        total = sum(math.exp(x) for x, ok in zip(logits, alike_k, strict=True) if ok)
        for j, (x, ok) in enumerate(zip(logits, alike_k, strict=True)):
            values[i, j] = math.exp(x) / total if ok else 0.0
    kept = ~torch.tensor(alike_q)[:, None] | ~torch.tensor(alike_k)
    return values, kept


def _mixed() -> tuple[Tensor, Tensor, Tensor]:
    """Blocks of like tokens and blocks of noise."""
    q, k, v = inputs(SMALL, seed=2)
    gen = torch.Generator().manual_seed(7)
    for x in (q, k):
        for start in range(0, SMALL.tokens, 64):
            x[:, :, start : start + 32] += 4 * torch.randn(1, 3, 1, 32, generator=gen)
    return q, k, v


def test_scores_and_gate_follow_the_formula() -> None:
    q, k, v = _mixed()
    got = scores("sparge", q, k, v, SMALL, **BLOCKS)
    assert got.insist is not None
    for head in range(3):
        values, kept = _oracle(q[0, head], k[0, head], 0.6)
        assert torch.equal(got.insist[0, head], kept)
        torch.testing.assert_close(got.values[0, head], values, atol=1e-5, rtol=1e-4)
    assert 0.1 < float(got.insist.float().mean()) < 0.9


def test_the_block_that_crosses_the_share_is_not_kept() -> None:
    q, k, v = _mixed()
    method = get_method("sparge").replace(select="cdf:0.7", **BLOCKS)
    ctx = context(method, q, k, v, SMALL)
    levels = plan(method, q, k, v, SMALL).mask.levels()
    for head in range(3):
        values, kept = _oracle(q[0, head], k[0, head], 0.6)
        for i in range(len(values)):
            mass = 0.0
            for place, j in enumerate(values[i].argsort(descending=True).tolist()):
                mass += float(values[i, j])
                if mass > 0.7 and place:
                    break
                kept[i, j] = True
        kept |= ctx.forced.cols | ctx.forced.rows[:, None]
        assert torch.equal(levels[0, head] > 0, kept)


def test_a_density_lowers_the_gate() -> None:
    """Noise everywhere would keep everything; asked for a density, half of it is left for the scores."""
    q, k, v = (torch.randn(1, 2, HUNYUAN.tokens, 32, generator=torch.Generator().manual_seed(i)) for i in range(3))
    method = get_method("sparge").replace(**BLOCKS)
    assert plan(method, q, k, v, HUNYUAN).density.min() == 1
    made = plan(method.replace(density=0.3), q, k, v, HUNYUAN)
    assert float(made.density.mean()) == pytest.approx(0.3, abs=0.02)


def test_without_a_gate_smoothed_means_alone_decide() -> None:
    q, k, v = _mixed()
    got = scores("sparge_topk", q, k, v, SMALL, **BLOCKS)
    assert got.insist is not None
    assert not got.insist.any()
    values, _ = _oracle(q[0, 0], k[0, 0], -0.1)
    torch.testing.assert_close(got.values[0, 0], values, atol=1e-5, rtol=1e-4)
    shifted = scores("sparge_topk", q, k + 3.0, v, SMALL, **BLOCKS)
    torch.testing.assert_close(shifted.values, got.values, atol=1e-4, rtol=1e-3)
