"""Blocks by the error that their means would leave, from block statistics alone: our own."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.context import PlanContext
from dit_accel.geometry import TokenGeometry
from dit_accel.score._registry import SCORES, Scores
from dit_accel_kernels.stats.moments import BlockMoments, block_moments
from dit_accel_kernels.types import TokenOrder

__all__ = ["expected_errors", "spread_of"]

_MAP = 1 << 24  # entries of maps of blocks that are made at once


def spread_of(query: BlockMoments, key: BlockMoments, value: BlockMoments, scale: float) -> Tensor:
    """Error that stays if a block of keys enters as its mean, by block of queries: float32 ``[B, H, Qb, Kb]``.

    With ``q = q̄ + a`` and ``k = k̄ + b`` a logit is ``q̄ k̄ + a k̄ + q̄ b + a b``. The pooled key has the first two, the
    correction at the mean query (:mod:`dit_accel.compensate.query_mean`) the third. What stays is ``a b``, of variance
    ``scale^2 sum_d var(a_d) var(b_d)`` for channels that vary apart from each other; the error of the output is the
    softmax mass of the block times its deviation times the root mean square distance of its values from the output.

    Args:
        query: moments ``[B, H, Qb, D]``.
        key: moments ``[B, H, Kb, D]``.
        value: like ``key``.
        scale: factor of the logits.
    """
    mass = (query.mean @ key.mean.mT).mul_(scale).add_(key.size.log()[:, None, None]).softmax(-1)
    deviation = (query.variance @ key.variance.mT).clamp_(min=0).sqrt_().mul_(scale)
    output = mass @ value.mean
    near = (value.mean.square() + value.variance).sum(-1)[..., None, :]
    far = (output @ value.mean.mT).mul_(-2).add_(near).add_(output.square().sum(-1, keepdim=True))
    return mass.mul_(deviation).mul_(far.clamp_(min=0).sqrt_())


def expected_errors(ctx: PlanContext, table: Tensor, rows: Tensor, kept: int) -> Tensor:
    """Squared error that block statistics expect of blocks that would be skipped, float32 ``[N, H]``.

    Args:
        ctx: queries, keys and values in natural order.
        table: candidate orders, int32 ``[N, S]``.
        rows: blocks of queries to look at.
        kept: blocks that each of them keeps.

    Raises:
        ValueError: the caller of the planner gave no values.
    """
    if ctx.value is None:
        raise ValueError("order_choice 'spread' looks at the values, and the caller of the planner gave none")
    batch, heads = ctx.query.shape[:2]
    # Some candidates at a time: each launch takes the host about as long as its work takes the GPU.
    step = max(1, _MAP // (batch * heads * ctx.k_blocks * ctx.query.shape[3]))
    errors = []
    for some in table.split(step):
        found = [_moments_in(ctx, some[i : i + 1], rows) for i in range(some.shape[0])]
        q, k, v = (_together(parts) for parts in zip(*found, strict=True))
        ranked = spread_of(q, k, v, ctx.scale).square_().sort(dim=-1, descending=True).values
        errors.append(ranked[..., kept:].sum(-1).unflatten(0, (-1, batch)).mean((1, 3)))
    return torch.cat(errors)


def _moments_in(ctx: PlanContext, candidate: Tensor, rows: Tensor) -> tuple[BlockMoments, BlockMoments, BlockMoments]:
    """Moments of some blocks of queries and of all blocks of keys and values, all heads in one order ``[1, S]``."""
    assert ctx.value is not None
    order = TokenOrder(candidate, torch.zeros(ctx.query.shape[1], dtype=torch.int32, device=candidate.device))
    valid = None if ctx.key_valid is None else ctx.key_valid[:, candidate[0].long()]
    q = block_moments(ctx.query, block=ctx.block_q, order=order, rows=rows)
    k, v = (block_moments(x, block=ctx.block_k, order=order, key_valid=valid) for x in (ctx.key, ctx.value))
    return q, k, v


def _together(parts: tuple[BlockMoments, ...]) -> BlockMoments:
    """Moments of several orders as further batch elements; sizes that all share stay one."""
    mean, variance, size = (torch.cat(x) for x in zip(*parts, strict=True))
    return BlockMoments(mean, variance, size if size.shape[0] == mean.shape[0] else parts[0].size)


def _cost(method: object, geometry: TokenGeometry) -> float:
    q, k = getattr(method, "block_q", 64), getattr(method, "block_k", 64)
    return float(1.0 / (q * k))


@SCORES.register("spread", cost=_cost)
def spread(ctx: PlanContext) -> Scores:
    """Mass of block means times the spread of logits and values within the block: error, not mass.

    It needs no dense step, so that plans can be made at any step; two products of block statistics are all it costs.

    Raises:
        ValueError: the caller of the planner gave no values.
    """
    if ctx.value is None:
        raise ValueError("this method looks at the values, and the caller of the planner gave none")
    q = block_moments(ctx.query, block=ctx.block_q, order=ctx.order)
    k, v = (block_moments(x, block=ctx.block_k, order=ctx.key_order, key_valid=ctx.valid) for x in (ctx.key, ctx.value))
    batch, heads = ctx.query.shape[:2]
    found = torch.empty(batch, heads, ctx.q_blocks, ctx.k_blocks, device=ctx.query.device)
    step = max(1, _MAP // found[:, 0].numel())
    for i in range(0, heads, step):  # some heads at a time, so that what stands between stays small
        some = slice(i, i + step)
        part_q, part_k, part_v = (BlockMoments(x.mean[:, some], x.variance[:, some], x.size) for x in (q, k, v))
        found[:, some] = spread_of(part_q, part_k, part_v, ctx.scale)
    ctx.spend(1.0 / (ctx.block_q * ctx.block_k))
    return Scores(found)
