"""Attention among samples of each block (ASA, arXiv 2508.10774; PSA, arXiv 2512.04025)."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.context import PlanContext
from dit_accel.score._blocks import unless_finite
from dit_accel.score._registry import SCORES, Scores
from dit_accel_kernels import sampled_scores

__all__ = ["sample_positions"]

_SHARE = 0.25


def _cost(method: object, geometry: object) -> float:
    share = SCORES.argument(getattr(method, "score", "sampled"), 1, "share")
    return 0.5 * float(share) ** 2 if isinstance(share, int | float) else 0.0


def sample_positions(tokens: int, block: int, samples: int, device: torch.device) -> Tensor:
    """Evenly spread positions of each block, int64 ``[1, blocks, samples]``; -1 where a ragged last block has fewer."""
    start = torch.arange(0, tokens, block, device=device)[:, None]
    length = (tokens - start).clamp(max=block)
    place = torch.arange(samples, device=device)
    taken = length.clamp(max=samples)
    return torch.where(place < taken, start + place * length // taken, -1)[None]


@SCORES.register("sampled", paper="arXiv 2508.10774", cost=_cost)
def sampled(ctx: PlanContext, reduce: str = "max", share: float = _SHARE) -> Scores:
    """Softmax of a sample of queries over a sample of keys: its maximum in a block, or its sum.

    With ``share`` of the tokens of each block, ``score[i, j] = max over sampled rows r of i, sampled keys k of j of
    exp(s_rk) / sum_k' exp(s_rk')``, the sum over all sampled keys. The maximum keeps blocks that one query depends on, and
    that a mean would hide. ``reduce="mean"`` sums over the keys and averages over the rows, an estimate of softmax mass.

    Raises:
        ValueError: if ``reduce`` is unknown or ``share`` is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share of sampled tokens must be above 0 and at most 1, got {share!r}")
    counts = [max(round(share * block), 1) for block in (ctx.block_q, ctx.block_k)]
    device = ctx.query.device
    values = sampled_scores(
        ctx.query,
        ctx.keys,
        sample_positions(ctx.query.shape[2], ctx.block_q, counts[0], device),
        sample_positions(ctx.key.shape[2], ctx.block_k, counts[1], device),
        reduce=reduce,
        scale=ctx.scale,
        order=ctx.order,
        key_valid=ctx.valid,
    )
    ctx.spend(0.5 * counts[0] * counts[1] / (ctx.block_q * ctx.block_k))
    return Scores(values + unless_finite(ctx), is_mass=reduce == "mean")
