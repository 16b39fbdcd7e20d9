"""Blocks by the error that their means would leave, from block statistics alone: our own."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dit_accel.context import PlanContext
from dit_accel.geometry import TokenGeometry
from dit_accel.score._registry import SCORES, Scores

__all__ = ["Moments", "moments", "spread_of"]


class Moments(NamedTuple):
    """First and second moments of each block of tokens of one head.

    Attributes:
        mean: float32 ``[B, N, D]``.
        variance: float32 ``[B, N, D]``.
        size: float32 ``[B|1, N]``, tokens that count.
    """

    mean: Tensor
    variance: Tensor
    size: Tensor


def moments(x: Tensor, block: int, valid: Tensor | None = None) -> Moments:
    """Mean and variance of each block of one head.

    Args:
        x: ``[B, S, D]`` in block order.
        block: tokens in a block; the last one may be ragged.
        valid: bool ``[B, S]``; others count nothing, whatever they hold.
    """
    short = -x.shape[1] % block
    seen = torch.ones(1, x.shape[1], dtype=torch.bool, device=x.device) if valid is None else valid
    wide = x.float() if valid is None else x.float().masked_fill(~valid[..., None], 0)
    parts = F.pad(wide, (0, 0, 0, short)).unflatten(1, (-1, block))
    weight = F.pad(seen, (0, short)).unflatten(1, (-1, block))[..., None].float()
    count = weight.sum(2).clamp(min=1)
    mean = parts.sum(2) / count
    variance = ((parts - mean[:, :, None]) * weight).square().sum(2) / count
    return Moments(mean, variance, weight.sum((2, 3)))


def spread_of(query: Moments, key: Moments, value: Moments, scale: float) -> Tensor:
    """Error that stays if a block of keys enters as its mean, by block of queries: float32 ``[B, Qb, Kb]``.

    With ``q = q̄ + a`` and ``k = k̄ + b`` a logit is ``q̄ k̄ + a k̄ + q̄ b + a b``. The pooled key has the first two, the
    correction at the mean query (:mod:`dit_accel.compensate.query_mean`) the third. What stays is ``a b``, of variance
    ``scale^2 sum_d var(a_d) var(b_d)`` for channels that vary apart from each other; the error of the output is the
    softmax mass of the block times its deviation times the root mean square distance of its values from the output.
    """
    logits = query.mean @ key.mean.mT * scale + key.size.log()[:, None]
    mass = logits.softmax(-1)
    deviation = (query.variance @ key.variance.mT).clamp(min=0).sqrt() * scale
    output = mass @ value.mean
    square = (value.mean.square() + value.variance).sum(-1)[:, None] + output.square().sum(-1)[..., None]
    return mass * deviation * (square - 2 * output @ value.mean.mT).clamp(min=0).sqrt()


def _cost(method: object, geometry: TokenGeometry) -> float:
    q, k = getattr(method, "block_q", 64), getattr(method, "block_k", 64)
    return float(1.0 / (q * k))


@SCORES.register("spread", cost=_cost)
def spread(ctx: PlanContext) -> Scores:
    """Mass of block means times the spread of logits and values within the block: error, not mass.

    It needs no dense step, so that plans can be made at any step; two products of block statistics are all it costs.
    """
    values = ctx.values
    found = []
    for head in range(ctx.query.shape[1]):  # one head at a time, so that float32 copies stay small
        q = moments(ctx.queries[:, head], ctx.block_q)
        k = moments(ctx.keys[:, head], ctx.block_k, ctx.valid)
        v = moments(values[:, head], ctx.block_k, ctx.valid)
        found.append(spread_of(q, k, v, ctx.scale))
    ctx.spend(1.0 / (ctx.block_q * ctx.block_k))
    return Scores(torch.stack(found, 1))
