"""Sol-Attn's threshold (arXiv 2607.24027) and PISA's error terms (arXiv 2602.01077) against loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
from problems import VIDEO, context, make_plan, qkv, run
from torch import Tensor

from dit_accel.score.pisa import first_order_norms


def _blocks(x: Tensor) -> list[Tensor]:
    return list(x.double().split(64))


@pytest.mark.parametrize("tau", [0.5, 1.3])
def test_sol_keeps_what_stands_out(tau: float) -> None:
    tensors = qkv(VIDEO, seed=1)
    plan = make_plan("sol", VIDEO, tensors, select=f"threshold:{tau}")
    levels = plan.mask.levels()[0]
    scale = 32**-0.5
    for head in range(2):
        q, k = (_blocks(x[0, head]) for x in tensors[:2])
        means = torch.stack([b.mean(0) for b in k])
        mu, var = means.mean(0), means.var(0, unbiased=False)
        for i, rows in enumerate(q):
            centre = rows.mean(0)
            threshold = scale * centre @ mu + tau * math.sqrt(scale**2 * float(centre.square() @ var))
            scores = [float((scale * rows @ m).mean()) for m in means]
            kept = [s >= float(threshold) or abs(i - j) <= 1 for j, s in enumerate(scores)]
            kept[max(range(len(scores)), key=scores.__getitem__)] = True  # no row is empty
            assert levels[head, i].bool().tolist() == kept


def test_sol_weighs_skipped_blocks_by_every_query() -> None:
    tensors = qkv(VIDEO, seed=1)
    plan = make_plan("sol", VIDEO, tensors)
    levels, out = plan.mask.levels()[0], run(plan, tensors)[0]
    q, k, v = (x[0].double() for x in tensors)
    for head in range(2):
        for token in (0, 100, 300, 494):
            numerator, denominator = torch.zeros(32, dtype=torch.float64), 0.0
            for j, (kb, vb) in enumerate(zip(k[head].split(64), v[head].split(64), strict=True)):
                if levels[head, token // 64, j]:
                    weights = (q[head, token] @ kb.T * 32**-0.5).exp()
                    numerator, denominator = numerator + weights @ vb, denominator + float(weights.sum())
                else:
                    weight = float((q[head, token] @ kb.mean(0) * 32**-0.5).exp())
                    numerator, denominator = numerator + weight * vb.sum(0), denominator + weight * len(kb)
            torch.testing.assert_close(out[head, token].double(), numerator / denominator, atol=2e-4, rtol=1e-3)


def test_pisa_selects_by_the_error_that_is_left() -> None:
    tensors = qkv(VIDEO, seed=2)
    plan = make_plan("pisa", VIDEO, tensors, density=0.25)
    levels = plan.mask.levels()[0]
    for head in range(2):
        q, k, v = (_blocks(x[0, head]) for x in tensors)
        size = [float(torch.linalg.norm((kb - kb.mean(0)).T @ vb)) for kb, vb in zip(k, v, strict=True)]
        for i, rows in enumerate(q):
            scores = [float(rows.mean(0) @ kb.mean(0)) * 32**-0.5 + math.log(n) for kb, n in zip(k, size, strict=True)]
            best = sorted(range(len(k)), key=lambda j: -scores[j])[: round(0.25 * len(k))]
            assert set(levels[head, i].nonzero()[:, 0].tolist()) == set(best)


def test_pisa_adds_one_first_order_term() -> None:
    tensors = qkv(VIDEO, seed=2)
    plan = make_plan("pisa", VIDEO, tensors, density=0.25)
    levels, out = plan.mask.levels()[0], run(plan, tensors)[0]
    q, k, v = (x[0].double() for x in tensors)
    scale = 32**-0.5
    for head in range(2):
        pairs = list(zip(k[head].split(64), v[head].split(64), strict=True))
        moment = sum((kb - kb.mean(0)).T @ vb for kb, vb in pairs)
        for token in (5, 200, 490):
            numerator, exact, pooled = torch.zeros(32, dtype=torch.float64), 0.0, 0.0
            for j, (kb, vb) in enumerate(pairs):
                if levels[head, token // 64, j]:
                    weights = (q[head, token] @ kb.T * scale).exp()
                    numerator, exact = numerator + weights @ vb, exact + float(weights.sum())
                else:
                    weight = float((q[head, token] @ kb.mean(0) * scale).exp())
                    numerator, pooled = numerator + weight * vb.sum(0), pooled + weight * len(kb)
            wanted = (numerator + scale * (q[head, token] @ moment) * pooled / VIDEO.tokens) / (exact + pooled)
            torch.testing.assert_close(out[head, token].double(), wanted, atol=3e-4, rtol=1e-3)


def test_first_order_norms_leave_invalid_keys_out() -> None:
    _, ctx = context("pisa", VIDEO, qkv(VIDEO), density=0.3)
    valid = torch.ones(1, VIDEO.tokens, dtype=torch.bool)
    valid[:, -20:] = False
    keys, values = ctx.keys.clone(), ctx.values.clone()
    keys[:, :, -20:] = float("nan")
    last = VIDEO.tokens // 64 * 64
    means = torch.stack([part.mean(2) for part in keys.split(64, 2)], 2)
    means[:, :, -1] = keys[:, :, last:-20].mean(2)
    found = first_order_norms(keys, values, means, valid, 64)
    spread = keys[:, :, last:-20] - means[:, :, -1:]
    torch.testing.assert_close(found[:, :, -1], torch.linalg.matrix_norm(spread.mT @ values[:, :, last:-20]))
