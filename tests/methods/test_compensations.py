"""Rectified, agent and residual compensation against loops from their formulas."""

from __future__ import annotations

import torch
from problems import FLUX, VIDEO, make_plan, qkv, run
from torch import Tensor
from torch.nn import functional as F

from dit_accel.compensate.agent import agent_attention


def _tight(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of a block are alike, so that some pooled logits can be trusted."""
    gen = torch.Generator().manual_seed(seed)
    centres = torch.randn(3, 1, 2, 8, 32, generator=gen).repeat_interleave(64, 3)[..., : VIDEO.tokens, :]
    q, k, v = centres + 0.1 * torch.randn(centres.shape, generator=gen)
    return q, k, v


def test_rectified_adds_approved_blocks_by_pooled_weights() -> None:
    """Every quantity of arXiv 2511.19835 from its definition, block by block."""
    tensors = _tight(4)
    changes = {"order": "raster", "score": "mean_pool", "select": "top_k", "density": 0.2}
    plan = make_plan("agent", VIDEO, tensors, compensate="rectified", **changes)
    plain = make_plan("agent", VIDEO, tensors, compensate="drop", **changes)
    out, sparse = run(plan, tensors)[0], run(plain, tensors)[0]
    levels = plan.mask.levels()[0]
    approved = 0
    for head in range(2):
        q, k, v = (x[0, head].double().split(64) for x in tensors)
        spread_q = [(b - b.mean(0)).abs().mean(0) for b in q]
        spread_k = [(b - b.mean(0)).abs().mean(0) for b in k]
        for i, rows in enumerate(q):
            centre = rows.mean(0)
            logits = torch.stack([centre @ b.mean(0) * 32**-0.5 + torch.tensor(float(len(b))).log() for b in k])
            weights = logits.softmax(0)
            added, more = 0.0, torch.zeros(32, dtype=torch.float64)
            for j, keys in enumerate(k):
                mean = keys.mean(0)
                doubt = spread_q[i] @ mean.abs() + centre.abs() @ spread_k[j]
                if not levels[head, i, j] and (centre @ mean).abs() > doubt:
                    added, more = added + float(weights[j]), more + weights[j] * v[j].mean(0)
                    approved += 1
            part = slice(i * 64, i * 64 + len(rows))
            wanted = sparse[head, part].double() * (1 - added) + more
            torch.testing.assert_close(out[head, part].double(), wanted, atol=2e-4, rtol=1e-3)
    assert approved > 3


def test_rectified_follows_an_order() -> None:
    """The same correction, carried back to natural order."""
    tensors = _tight(4)
    changes = {"order": "hwf", "score": "mean_pool", "select": "top_k", "density": 0.2}
    plan = make_plan("agent", VIDEO, tensors, compensate="rectified", **changes)
    assert plan.order is not None
    table = plan.order.table[0].long()
    moved = tuple(x[:, :, table] for x in tensors)
    same = make_plan("agent", VIDEO, moved, compensate="rectified", **{**changes, "order": "raster"})  # type: ignore[arg-type]
    torch.testing.assert_close(run(plan, tensors)[:, :, table], run(same, moved), atol=1e-4, rtol=1e-3)  # type: ignore[arg-type]


def test_agents_are_two_softmaxes() -> None:
    q, k, v = qkv(FLUX)
    agents = torch.stack([part.mean(2) for part in q.split(-(-FLUX.tokens // 16), 2)], 2)
    inner = (agents @ k.mT * 0.2).softmax(-1) @ v
    wanted = (q @ agents.mT * 0.2).softmax(-1) @ inner
    torch.testing.assert_close(agent_attention(q, k, v, 16, 0.2, None), wanted, atol=1e-5, rtol=1e-4)


def test_agents_stand_for_the_missing_share() -> None:
    tensors = qkv(FLUX, seed=5)
    plan, plain = (make_plan("agent", FLUX, tensors, density=0.2, **c) for c in ({}, {"compensate": "drop"}))
    dense = F.scaled_dot_product_attention(*tensors)
    errors = [float((run(p, tensors) - dense).norm()) for p in (plan, plain)]
    assert errors[0] < errors[1]


def test_residual_restores_the_step_it_was_made_on() -> None:
    tensors = qkv(VIDEO, seed=6)
    plan = make_plan("residual", VIDEO, tensors)
    dense = F.scaled_dot_product_attention(*tensors)
    torch.testing.assert_close(run(plan, tensors), dense, atol=1e-4, rtol=1e-3)
    q, k, v = tensors
    later = (q, k, v + 0.05 * torch.randn(v.shape, generator=torch.Generator().manual_seed(1)))
    plain = make_plan("residual", VIDEO, tensors, compensate="drop")
    wanted = dense - run(plain, tensors) + run(plain, later)
    torch.testing.assert_close(run(plan, later), wanted, atol=1e-4, rtol=1e-3)
    near = F.scaled_dot_product_attention(*later)
    assert (run(plan, later) - near).norm() < 0.3 * (run(plain, later) - near).norm()
