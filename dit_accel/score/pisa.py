"""Blocks by the error that approximating them would leave (PISA, arXiv 2602.01077)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dit_accel.context import PlanContext
from dit_accel.score._registry import SCORES, Scores

__all__ = ["first_order_norms"]


def first_order_norms(keys: Tensor, values: Tensor, means: Tensor, valid: Tensor | None, block: int) -> Tensor:
    """Frobenius norm of ``(K_j - mean_j)^T V_j`` for each block, float32 ``[B, H, Kb]``.

    One ``[D, D]`` matrix a block is made for one head at a time.
    """
    tokens = keys.shape[2]
    short = -tokens % block
    norms = []
    for head in range(keys.shape[1]):
        k = F.pad(keys[:, head].float(), (0, 0, 0, short)).unflatten(1, (-1, block)) - means[:, head, :, None].float()
        v = F.pad(values[:, head].float(), (0, 0, 0, short)).unflatten(1, (-1, block))
        if valid is not None:
            hidden = ~F.pad(valid, (0, short)).unflatten(1, (-1, block))[..., None]
            k, v = k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)
        norms.append(torch.linalg.matrix_norm(k.mT @ v))
    return torch.stack(norms, 1)


def _cost(method: object, geometry: object) -> float:
    return float(0.5 / (getattr(method, "block_q", 64) * getattr(method, "block_k", 64)))


@SCORES.register("pisa", paper="arXiv 2602.01077", cost=_cost)
def pisa(ctx: PlanContext) -> Scores:
    """``scale * mean_q_i . mean_k_j + log |H_j|`` with ``H_j = (K_j - mean_j)^T V_j``: error, not mass."""
    mean_k, _, count = ctx.key_stats
    norm = first_order_norms(ctx.keys, ctx.values, mean_k, ctx.valid, ctx.block_k).clamp(min=1e-20)
    logits = torch.einsum("bhqd,bhkd->bhqk", ctx.query_stats.mean.float() * ctx.scale, mean_k.float())
    ctx.spend(0.5 / (ctx.block_q * ctx.block_k) + ctx.query.shape[-1] / (2 * ctx.query.shape[2]))
    found = logits + norm.log()[:, :, None]
    # Shares of a softmax keep the order of a row; scores below zero would be lost among those that count as the least.
    return Scores(found.masked_fill((count == 0)[:, None, None], -torch.inf).softmax(-1))
