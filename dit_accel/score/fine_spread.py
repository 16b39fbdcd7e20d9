"""Blocks by the error that their means would leave, with their mass from means of a few tokens: our own."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dit_accel.context import PlanContext
from dit_accel.geometry import TokenGeometry
from dit_accel.score._registry import SCORES, Scores

__all__ = ["fine_mass"]

_MAP = 1 << 24  # entries of maps of fine blocks that are made at once


class _Moments(NamedTuple):
    """Mean and variance of runs of tokens, float32 ``[B, H, N, D]``, and how many are valid, ``[B|1, N]``."""

    mean: Tensor
    variance: Tensor
    size: Tensor

    @classmethod
    def of(cls, x: Tensor, run: int, valid: Tensor | None) -> _Moments:
        """Of ``x`` ``[B, H, S, D]``; invalid tokens, bool ``[B, S]``, count nothing, whatever they hold."""
        tokens = x.shape[2]
        seen = torch.ones(1, tokens, dtype=torch.bool, device=x.device) if valid is None else valid
        seen = F.pad(seen, (0, -tokens % run)).unflatten(1, (-1, run))
        size = seen.sum(2, dtype=torch.float32)
        hidden, count = ~seen[:, None, :, :, None], size.clamp(min=1)[:, None, :, None]
        parts = F.pad(x.float(), (0, 0, 0, -tokens % run)).unflatten(2, (-1, run)).masked_fill(hidden, 0.0)
        mean = parts.sum(3) / count
        off = (parts - mean[:, :, :, None]).masked_fill_(hidden, 0.0)
        return cls(mean, off.square_().sum(3) / count, size)


def fine_mass(query: _Moments, key: _Moments, ratio: tuple[int, int], scale: float) -> Tensor:
    """Softmax mass of each block if runs of a few tokens were their means, float32 ``[B, H, Qb, Kb]``; rows sum to 1.

    Args:
        query: moments of runs of queries, ``[B, H, N, D]``.
        key: moments of runs of keys.
        ratio: runs in a block of queries and in one of keys.
        scale: factor of the logits.
    """
    logits = (query.mean @ key.mean.mT).mul_(scale).add_(key.size.log()[:, None, None])
    mass: Tensor = logits.softmax(-1).mul_(query.size[:, None, :, None])
    tails = [-count % runs for count, runs in zip(mass.shape[2:], ratio, strict=True)]
    mass = F.pad(mass, (0, tails[1], 0, tails[0])).unflatten(2, (-1, ratio[0])).unflatten(4, (-1, ratio[1])).sum((3, 5))
    mass /= mass.sum(-1, keepdim=True)
    return mass


def _left(mass: Tensor, query: _Moments, key: _Moments, value: _Moments, scale: float) -> Tensor:
    """Mass times deviation of the logits times distance of the values from the output; see the score ``spread``."""
    deviation = (query.variance @ key.variance.mT).clamp_(min=0).sqrt_().mul_(scale)
    output = mass @ value.mean
    near = (value.mean.square() + value.variance).sum(-1)[..., None, :]
    far = (output @ value.mean.mT).mul_(-2).add_(near).add_(output.square().sum(-1, keepdim=True))
    return mass * deviation.mul_(far.clamp_(min=0).sqrt_())


def _cost(method: object, geometry: TokenGeometry, tokens: int = 8) -> float:
    q, k = getattr(method, "block_q", 64), getattr(method, "block_k", 64)
    return float(0.5 / tokens**2 + 1.0 / (q * k))


@SCORES.register("fine_spread", cost=_cost)
def fine_spread(ctx: PlanContext, tokens: int = 8) -> Scores:
    """Like ``spread``, but the mass of a block is that of the means of ``tokens`` queries and keys each.

    Where single tokens find single tokens, the mean of a block of keys says little of the mass in it. The map of finer
    means costs ``0.5 / tokens ** 2`` of dense attention a plan.

    Raises:
        ValueError: the caller of the planner gave no values, or ``tokens`` does not divide the blocks.
    """
    if ctx.value is None:
        raise ValueError("this method looks at the values, and the caller of the planner gave none")
    fits = type(tokens) is int and tokens >= 1 and ctx.block_q % tokens == 0 and ctx.block_k % tokens == 0
    if not fits:
        raise ValueError(
            f"score 'fine_spread' needs tokens that divide blocks of {ctx.block_q} x {ctx.block_k}, got {tokens!r}"
        )
    batch, heads = ctx.query.shape[:2]
    found = torch.empty(batch, heads, ctx.q_blocks, ctx.k_blocks, device=ctx.query.device)
    step = max(1, _MAP * tokens**2 // (batch * ctx.query.shape[2] * ctx.key.shape[2]))
    for first in range(0, heads, step):  # some heads at a time, so that what stands between stays small
        some = slice(first, first + step)
        query, key, value = ctx.queries[:, some], ctx.keys[:, some], ctx.values[:, some]
        fine = _Moments.of(query, tokens, None), _Moments.of(key, tokens, ctx.valid)
        mass = fine_mass(*fine, (ctx.block_q // tokens, ctx.block_k // tokens), ctx.scale)
        of_keys, of_values = (_Moments.of(x, ctx.block_k, ctx.valid) for x in (key, value))
        found[:, some] = _left(mass, _Moments.of(query, ctx.block_q, None), of_keys, of_values, ctx.scale)
    ctx.spend(_cost(ctx.method, ctx.geometry, tokens))
    return Scores(found)
