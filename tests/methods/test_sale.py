"""SALE: integer logits against an exact anchor."""

from __future__ import annotations

import math

import pytest
import torch

from dit_accel.presets import get_method
from tests.methods._scored import HUNYUAN, SMALL, context, inputs, plan, scores

SIZES = {"block_q": 32, "block_k": 16}


def _quantise(x: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Integers from -7 to 7, and their scale."""
    scale = float(x.abs().max()) / 7
    return (x / scale).round().to(torch.int64), scale


def _in_anchor(i: int, j: int, tokens: int, sink: int, local: int) -> bool:
    """Whether key block j belongs to the anchor of query block i."""
    low, high = max(i * 32 - local // 2, 0), min(i * 32 + 32 + local // 2, tokens)
    return j * 16 < sink or (j * 16 < high and (j + 1) * 16 > low)


@pytest.mark.parametrize(("sink", "local"), [(16, 16), (32, 64), (0, 0)])
def test_scores_follow_the_formula(sink: int, local: int) -> None:
    q, k, v = inputs(SMALL)
    got = scores("sale", q, k, v, SMALL, score=f"low_bit:sink={sink},local={local}", **SIZES)
    assert got.insist is not None
    tokens, dim = q.shape[2:]
    for head in range(3):
        smooth = k[0, head] - k[0, head].mean(0)
        k_int = [_quantise(smooth[s : s + 16]) for s in range(0, tokens, 16)]
        for i in range(got.values.shape[2]):
            anchor = [j for j in range(len(k_int)) if _in_anchor(i, j, tokens, sink, local)]
            assert got.insist[0, head, i].nonzero()[:, 0].tolist() == anchor
            keys = [t for j in anchor for t in range(j * 16, min(j * 16 + 16, tokens))]
            best = [-math.inf] * len(k_int)
            for row in q[0, head, i * 32 : (i + 1) * 32]:
                q_int, q_scale = _quantise(row)
                base = float((smooth[keys] @ row / math.sqrt(dim)).logsumexp(0))
                for j, (ints, scale) in enumerate(k_int):
                    top = int((ints @ q_int).max())
                    best[j] = max(best[j], top * scale * q_scale / math.sqrt(dim) - base)
            torch.testing.assert_close(got.values[0, head, i], torch.tensor(best), atol=1e-4, rtol=1e-4)


def test_a_block_is_kept_if_its_weight_exceeds_tau() -> None:
    q, k, v = inputs(HUNYUAN)
    method = get_method("sale").replace(select="relative:0.05", score="low_bit:sink=16,local=0", **SIZES)
    ctx = context(method, q, k, v, HUNYUAN)
    got = scores("sale", q, k, v, HUNYUAN, score="low_bit:sink=16,local=0", **SIZES)
    assert got.insist is not None
    kept = (got.values.exp() > 0.05) | got.insist | ctx.forced.cols | ctx.forced.rows[:, None]
    levels = plan(method, q, k, v, HUNYUAN).mask.levels()
    assert torch.equal(levels > 0, kept)
    assert 0.1 < float(kept.float().mean()) < 0.9


def test_integer_products_are_exact_in_half_precision() -> None:
    """bfloat16 inputs: the integers and their sums are those of int64."""
    from dit_accel.score._blocks import row_reductions
    from dit_accel.score.low_bit import quantised

    gen = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 64, 256, generator=gen) for _ in range(2))
    rows, cols = quantised(q, (3,), 7)[0], quantised(k, (3,), 7)[0]
    seen = torch.ones(1, 1, 64, dtype=torch.bool)
    parts = row_reductions(rows.bfloat16(), cols.bfloat16(), seen, block_q=16, block_k=16, scale=1.0)
    got = torch.cat([top for _, _, top, _ in parts], 2)
    want = (rows.long() @ cols.long().mT).unflatten(3, (4, 16)).amax(4)
    assert torch.equal(got.round().long(), want)
    torch.testing.assert_close(got, want.float(), atol=1e-3, rtol=0)


def test_bad_values_are_refused() -> None:
    q, k, v = inputs(SMALL)
    with pytest.raises(ValueError, match="bits from 2 to 8"):
        scores("sale", q, k, v, SMALL, score="low_bit:16")
    with pytest.raises(ValueError, match="tau must be positive, got 0"):
        plan(get_method("sale").replace(select="relative:0"), q, k, v, SMALL)
