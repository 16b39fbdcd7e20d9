"""Means of chunks of unequal length, scaled by the root of their length (DHSA, arXiv 2510.24606)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dit_accel.context import PlanContext
from dit_accel.score._blocks import lowest_where
from dit_accel.score._registry import SCORES, Scores

__all__ = ["chunk_ids"]

_CHUNK = 1 << 25  # elements of keys at once
_TINY = 1e-8


@SCORES.register("chunks", paper="arXiv 2510.24606")
def chunks(ctx: PlanContext, length: int = 64, window: int = 16) -> Scores:
    """Similarity of chunks ``sqrt(n_a) mean(Q_a) . sqrt(n_b) mean(K_b) * scale``, averaged over the tokens of each block.

    Every token of a block has the similarity of its chunk (DHSA's upsampling); a block gets the mean of its pairs of
    tokens. The paper's boundaries come from a trained predictor; here a chunk ends where the keys change most, see
    :func:`chunk_ids`, and queries have the chunks of the keys.

    Args:
        ctx: what to plan from.
        length: mean tokens of a chunk.
        window: keys that are compared on each side of a boundary.

    Raises:
        ValueError: if a size is below 1.
    """
    if length < 1 or window < 1:
        raise ValueError(f"length and window must be at least 1 token, got {length=} and {window=}")
    tokens = ctx.key.shape[2]
    count = -(-tokens // length)
    step = max(1, _CHUNK // (ctx.key.shape[0] * tokens * ctx.key.shape[3]))
    parts = []
    for queries, keys in zip(ctx.queries.split(step, 1), ctx.keys.split(step, 1), strict=True):
        valid = torch.ones(1, tokens, dtype=torch.bool, device=keys.device) if ctx.valid is None else ctx.valid
        clean = keys.float().masked_fill(~valid[:, None, :, None], 0)
        ids = chunk_ids(clean, count, window)
        every = torch.ones_like(valid)
        similar = _means(queries.float(), ids, every, count) @ _means(clean, ids, valid, count).mT * ctx.scale
        parts.append(_shares(ids, every, ctx.block_q, count) @ similar @ _shares(ids, valid, ctx.block_k, count).mT)
    ctx.spend(0.5 * (count / tokens) ** 2)
    return Scores(lowest_where(torch.cat(parts, 1), (ctx.key_stats.count == 0)[:, None, None]))


def chunk_ids(keys: Tensor, count: int, window: int) -> Tensor:
    """Cut each head's sequence where the mean directions of the ``window`` keys before and after differ most.

    Of positions closer than half a window only the best is a boundary, so that there may be fewer chunks than ``count``.

    Args:
        keys: float32 ``[B, H, S, D]``.
        count: most chunks.
        window: keys on each side.

    Returns:
        int64 ``[B, H, S]``, chunk of each token, rising from 0.
    """
    tokens = keys.shape[2]
    runs = _run_sums(F.pad(F.normalize(keys, dim=-1), (0, 0, window, window)), window)
    length = runs.norm(dim=-1).clamp(min=_TINY)
    before, after = slice(0, tokens), slice(window, window + tokens)  # runs that end, and that begin, at a token
    change = -(runs[:, :, before] * runs[:, :, after]).sum(-1) / (length[..., before] * length[..., after])
    change[..., 0] = -torch.inf  # where the first chunk starts anyway
    half = window // 2
    peak = F.max_pool1d(change, 2 * half + 1, stride=1, padding=half)
    change = change.masked_fill(change < peak, -torch.inf)
    best = change.topk(min(count - 1, tokens), dim=-1).indices
    starts = torch.zeros_like(change, dtype=torch.bool).scatter_(-1, best, True) & torch.isfinite(change)
    return starts.cumsum(-1)


def _run_sums(x: Tensor, window: int) -> Tensor:
    """Sums of ``window`` consecutive tokens, ``[B, H, S, D]`` to ``[B, H, S - window + 1, D]``.

    From runs of 1, 2, 4, ... tokens: a cumulative sum over tokens goes through them one by one.
    """
    size, done, total, runs = 1, 0, None, x
    count = x.shape[2] - window + 1
    while True:
        if window & size:
            part = runs[:, :, done : done + count]
            total, done = part if total is None else total + part, done + size
        if done == window:
            assert total is not None
            return total
        runs, size = runs[:, :, size:] + runs[:, :, :-size], 2 * size


def _means(x: Tensor, ids: Tensor, valid: Tensor, count: int) -> Tensor:
    """Mean of each chunk times the root of its length, float32 ``[B, H, count, D]``; 0 for chunks without valid tokens."""
    sums = x.new_zeros(*x.shape[:2], count, x.shape[3]).scatter_add_(2, ids[..., None].expand(x.shape), x)
    length = x.new_zeros(*x.shape[:2], count).scatter_add_(2, ids, valid[:, None].expand(ids.shape).float())
    return sums / length.clamp(min=1).sqrt()[..., None]


def _shares(ids: Tensor, valid: Tensor, block: int, count: int) -> Tensor:
    """Share of the valid tokens of each block that lie in each chunk, float32 ``[B, H, blocks, count]``."""
    tokens = ids.shape[2]
    blocks = -(-tokens // block)
    cell = torch.arange(tokens, device=ids.device) // block * count + ids
    weight = valid[:, None].expand(ids.shape).float()
    found: Tensor = weight.new_zeros(*ids.shape[:2], blocks * count).scatter_add_(2, cell, weight)
    found = found.unflatten(2, (blocks, count))
    return found / found.sum(-1, keepdim=True).clamp(min=1)
