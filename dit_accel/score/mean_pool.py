"""Mean-pooled queries against mean-pooled keys: what most methods score blocks by."""

from __future__ import annotations

import torch

from dit_accel.context import PlanContext
from dit_accel.score._registry import SCORES, Scores


def _cost(method: object, geometry: object) -> float:
    q, k = getattr(method, "block_q", 64), getattr(method, "block_k", 64)
    return float(0.5 / (q * k))


@SCORES.register("mean_pool", paper="arXiv 2502.18137", cost=_cost, by_head=True)
def mean_pool(ctx: PlanContext) -> Scores:
    """Softmax over block means ``q_i . k_j * scale + log(count_j)``."""
    mean_q = ctx.query_stats.mean.float()
    mean_k, _, count = ctx.key_stats
    logits = torch.einsum("bhqd,bhkd->bhqk", mean_q * ctx.scale, mean_k.float())
    logits = logits + count.to(torch.float32).log()[:, None, None]
    ctx.spend(0.5 / (ctx.block_q * ctx.block_k))
    return Scores(logits.softmax(-1), is_mass=True)
