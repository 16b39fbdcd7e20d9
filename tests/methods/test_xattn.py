"""XAttention, ASA and SubBlock: presets of the kernels' scores, against loops over the formulas."""

from __future__ import annotations

import math

import pytest
import torch

from dit_accel.presets import get_method
from dit_accel.score.sampled import sample_positions
from dit_accel_kernels.scores import sample_blocks
from tests.methods._scored import HUNYUAN, SMALL, context, inputs, plan, scores

BLOCK = 32


def test_xattn_scores_are_antidiagonal_sums() -> None:
    q, k, v = inputs(SMALL)
    got = scores("xattn", q, k, v, SMALL, block_q=BLOCK, block_k=BLOCK).values
    tokens, dim = q.shape[2:]
    cells = -(-tokens // 8)
    for head in range(3):
        logits = torch.zeros(cells, cells)
        for i in range(cells):
            for j in range(cells):
                for t in range(8):
                    row, col = i * 8 + 7 - t, j * 8 + t
                    if row < tokens and col < tokens:
                        logits[i, j] += q[0, head, row] @ k[0, head, col] / (8 * math.sqrt(dim))
        share = logits.softmax(-1)
        for i in range(got.shape[2]):
            for j in range(got.shape[3]):
                want = share[i * 4 : i * 4 + 4, j * 4 : j * 4 + 4].sum(1).mean()
                assert float(got[0, head, i, j]) == pytest.approx(float(want), abs=1e-5)


def test_xattn_keeps_the_fewest_blocks_with_nine_tenths() -> None:
    q, k, v = inputs(HUNYUAN)
    method = get_method("xattn").replace(block_q=BLOCK, block_k=BLOCK)
    ctx = context(method, q, k, v, HUNYUAN)
    values = scores("xattn", q, k, v, HUNYUAN, block_q=BLOCK, block_k=BLOCK).values
    levels = plan(method, q, k, v, HUNYUAN).mask.levels()
    for head in range(3):
        for i in range(values.shape[2]):
            ranked = sorted(range(values.shape[3]), key=lambda j: -float(values[0, head, i, j]))
            kept, mass = set(), 0.0
            for j in ranked:
                if mass >= 0.9 * float(values[0, head, i].sum()):
                    break
                kept.add(j)
                mass += float(values[0, head, i, j])
            kept |= {j for j in ranked if ctx.forced.cols[j] or ctx.forced.rows[i]}
            assert kept == set(levels[0, head, i].nonzero()[:, 0].tolist())


def test_xattn_is_estimated_on_every_sparse_step_after_five_of_fifty() -> None:
    from dit_accel.adapter import StepInfo
    from dit_accel.policy import Action, Policy

    policy = Policy(get_method("xattn"))
    assert policy.warmup_steps(50) == 5
    made = [policy.action(StepInfo(step=s, steps=50), s > 5, s - 1 if s > 5 else None) for s in range(50)]
    assert made == [Action.DENSE] * 5 + [Action.PLAN] * 45


@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_asa_scores_are_probabilities_of_samples(reduce: str) -> None:
    q, k, v = inputs(SMALL)
    changes = {"order": ("raster",), "block_q": BLOCK, "block_k": BLOCK, "score": f"sampled:{reduce}"}
    got = scores("asa", q, k, v, SMALL, **changes).values
    tokens, dim = q.shape[2:]
    picks = [
        [start + n * size // min(8, size) for n in range(min(8, size))]
        for start in range(0, tokens, BLOCK)
        for size in [min(BLOCK, tokens - start)]
    ]
    every = [t for block in picks for t in block]
    for head in range(3):
        for i, rows in enumerate(picks):
            share = (q[0, head, rows] @ k[0, head, every].T / math.sqrt(dim)).softmax(-1)
            for j, cols in enumerate(picks):
                part = share[:, [every.index(t) for t in cols]]
                want = part.max() if reduce == "max" else part.sum(1).mean()
                assert float(got[0, head, i, j]) == pytest.approx(float(want), abs=1e-5)


@pytest.mark.parametrize(("tokens", "block", "samples"), [(200, 64, 16), (130, 64, 16), (129, 128, 32), (7, 16, 4)])
def test_samples_are_those_of_the_kernels(tokens: int, block: int, samples: int) -> None:
    here = sample_positions(tokens, block, samples, torch.device("cpu"))
    assert torch.equal(here, sample_blocks(tokens, block, samples).long())


def test_subblock_scores_are_a_log_sum_exp_of_means() -> None:
    q, k, v = inputs(SMALL)
    got = scores("subblock", q, k, v, SMALL, block_q=BLOCK, block_k=BLOCK).values
    tokens, dim = q.shape[2:]

    def means(x: torch.Tensor, block: int) -> list[torch.Tensor]:
        starts = range(block * BLOCK, min((block + 1) * BLOCK, tokens), BLOCK // 4)
        return [x[s : min(s + BLOCK // 4, tokens)].mean(0) for s in starts]

    for head in range(3):
        for i in range(got.shape[2]):
            row = []
            for j in range(got.shape[3]):
                pairs = [float(a @ b) / math.sqrt(dim) for a in means(q[0, head], i) for b in means(k[0, head], j)]
                row.append(sum(math.exp(p) for p in pairs))
            want = torch.tensor(row) / sum(row)
            torch.testing.assert_close(got[0, head, i], want, atol=1e-5, rtol=1e-4)


def test_a_share_of_samples_out_of_range_is_refused() -> None:
    q, k, v = inputs(SMALL)
    with pytest.raises(ValueError, match="above 0 and at most 1, got 2"):
        scores("asa", q, k, v, SMALL, score="sampled:max,share=2")
