"""How far a block's mean score stands out among those of its row (Sol-Attn, arXiv 2607.24027)."""

from __future__ import annotations

import torch

from dit_accel.context import PlanContext
from dit_accel.score._registry import SCORES, Scores


@SCORES.register(
    "gaussian", paper="arXiv 2607.24027", cost=lambda method, geometry: 0.5 / (method.block_q * method.block_k)
)
def gaussian(ctx: PlanContext, near: int = 1) -> Scores:
    """Standard score of ``scale * mean_q_i . mean_k_j`` under a Gaussian model of the key means.

    With ``mu`` and ``var`` the mean and the diagonal variance of the block means of the keys, the score is
    ``scale (q_i . k_j - q_i . mu) / sqrt(scale^2 q_i^2 . var)``. The paper's threshold ``tau`` is a threshold of it:
    1.3 keeps about a tenth. Blocks on the diagonal and ``near`` beside it are exact.

    Raises:
        ValueError: if ``near`` is negative.
    """
    if isinstance(near, bool) or not isinstance(near, int) or near < 0:
        raise ValueError(f"near must be a number of blocks, at least 0, got {near!r}")
    mean_q = ctx.query_stats.mean.float()
    mean_k, _, count = ctx.key_stats
    seen = (count > 0)[:, None, :, None]
    keys = mean_k.float().masked_fill(~seen, 0)
    number = seen.sum(2, keepdim=True).clamp(min=1)
    mu = keys.sum(2, keepdim=True) / number
    var = ((keys - mu).square() * seen).sum(2, keepdim=True) / number
    logits = torch.einsum("bhqd,bhkd->bhqk", mean_q, keys - mu)
    spread = torch.einsum("bhqd,bhkd->bhqk", mean_q.square(), var).sqrt().clamp(min=1e-12)
    ctx.spend(0.5 / (ctx.block_q * ctx.block_k))
    rows = (torch.arange(ctx.q_blocks, device=mean_q.device)[:, None] + 0.5) * ctx.block_q / ctx.block_k
    distance = (rows - torch.arange(ctx.k_blocks, device=mean_q.device) - 0.5).abs()
    return Scores((logits / spread).masked_fill(~seen[..., 0][:, :, None], -torch.inf), distance <= near)
