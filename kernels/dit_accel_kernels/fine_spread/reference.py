"""The meaning of the expected errors with fine mass, in float32, some heads at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .._common import blocks

__all__ = ["fine_spread_scores_reference"]

_MAP = 1 << 24  # entries of maps of runs that are made at once


class _Moments(NamedTuple):
    """Mean and variance of runs of tokens, float32 ``[B, H, N, D]``, and how many are valid, ``[B, H, N]``."""

    mean: Tensor
    variance: Tensor
    size: Tensor

    @classmethod
    def of(cls, x: Tensor, run: int, seen: Tensor) -> _Moments:
        """Of ``x`` ``[B, H, S, D]``; tokens not ``seen``, bool ``[B, H, S]``, count nothing, whatever they hold."""
        tokens = x.shape[2]
        seen = F.pad(seen, (0, -tokens % run)).unflatten(2, (-1, run))
        size = seen.sum(3, dtype=torch.float32)
        hidden, count = ~seen[..., None], size.clamp(min=1)[..., None]
        parts = F.pad(x.float(), (0, 0, 0, -tokens % run)).unflatten(2, (-1, run)).masked_fill(hidden, 0.0)
        mean = parts.sum(3) / count
        off = (parts - mean[:, :, :, None]).masked_fill_(hidden, 0.0)
        return cls(mean, off.square_().sum(3) / count, size)


def _fine_mass(query: _Moments, key: _Moments, ratio: tuple[int, int], scale: float) -> Tensor:
    """Softmax mass of each block if runs of a few tokens were their means, float32 ``[B, H, Qb, Kb]``; rows sum to 1.

    Args:
        query: moments of runs of queries, ``[B, H, N, D]``.
        key: moments of runs of keys.
        ratio: runs in a block of queries and in one of keys.
        scale: factor of the logits.
    """
    logits = (query.mean @ key.mean.mT).mul_(scale).add_(key.size.log()[..., None, :])
    mass: Tensor = logits.softmax(-1).mul_(query.size[..., None])
    tails = [-count % runs for count, runs in zip(mass.shape[2:], ratio, strict=True)]
    mass = F.pad(mass, (0, tails[1], 0, tails[0])).unflatten(2, (-1, ratio[0])).unflatten(4, (-1, ratio[1])).sum((3, 5))
    mass /= mass.sum(-1, keepdim=True)
    return mass


def _left(mass: Tensor, query: _Moments, key: _Moments, value: _Moments, scale: float) -> Tensor:
    """Mass times deviation of the logits times distance of the values from the output."""
    deviation = (query.variance @ key.variance.mT).clamp_(min=0).sqrt_().mul_(scale)
    output = mass @ value.mean
    near = (value.mean.square() + value.variance).sum(-1)[..., None, :]
    far = (output @ value.mean.mT).mul_(-2).add_(near).add_(output.square().sum(-1, keepdim=True))
    return mass * deviation.mul_(far.clamp_(min=0).sqrt_())


def _in_order(
    x: Tensor, valid: Tensor | None, table: Tensor | None, head: Tensor | None, some: slice
) -> tuple[Tensor, Tensor]:
    """Some heads in block order, ``[B, h, S, D]``, and which tokens count, bool ``[B, h, S]``."""
    x = x[:, some]
    seen = torch.ones(1, x.shape[2], dtype=torch.bool, device=x.device) if valid is None else valid
    seen = seen[:, None].expand(x.shape[0], x.shape[1], -1)
    if table is None or head is None:
        return x, seen
    token = table.index_select(0, head[some])[None].long().expand(x.shape[0], -1, -1)
    return x.gather(2, token[..., None].expand(-1, -1, -1, x.shape[3])), seen.gather(2, token)


def fine_spread_scores_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tokens: int,
    block_q: int,
    block_k: int,
    scale: float,
    orders: Sequence[Tensor | None],
    key_valid: Tensor | None,
) -> Tensor:
    """See :func:`dit_accel_kernels.fine_spread.fine_spread_scores`."""
    batch, heads, queries, _ = query.shape
    keys, ratio = key.shape[2], (block_q // tokens, block_k // tokens)
    shape = (batch, heads, blocks(queries, block_q), blocks(keys, block_k))
    found = query.new_empty(shape, dtype=torch.float32)
    step = max(1, _MAP * tokens**2 // (batch * queries * keys))
    for first in range(0, heads, step):  # some heads at a time, so that what stands between stays small
        some = slice(first, first + step)
        q, q_seen = _in_order(query, None, orders[0], orders[1], some)
        k, seen = _in_order(key, key_valid, orders[2], orders[3], some)
        v, _ = _in_order(value, None, orders[2], orders[3], some)
        mass = _fine_mass(_Moments.of(q, tokens, q_seen), _Moments.of(k, tokens, seen), ratio, scale)
        moments = _Moments.of(q, block_q, q_seen), _Moments.of(k, block_k, seen), _Moments.of(v, block_k, seen)
        found[:, some] = _left(mass, *moments, scale)
    return found
