"""The anchor of SALE and AnchorAttention: the first keys and those around a query, whose softmax is known exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.context import PlanContext
from dit_accel_kernels.scores.reduce import CHUNK_ELEMENTS

__all__ = ["anchor_blocks", "anchor_region", "anchor_softmax"]


def anchor_blocks(ctx: PlanContext, *, sink: int, span: int, local: int) -> tuple[Tensor, Tensor]:
    """Key blocks of the anchor of each query block.

    Args:
        ctx: sizes.
        sink: tokens at the start of the sequence.
        span: queries that share an anchor, a multiple of the query block: their own keys are in it.
        local: further tokens on each side of the span.

    Returns:
        int64 ``[Qb, A]`` block ids, and bool ``[Qb, A]``, false for ids that count nothing.
    """
    tokens, block, device = ctx.key.shape[2], ctx.block_k, ctx.query.device
    first = min(-(-sink // block), ctx.k_blocks)
    start = torch.arange(ctx.q_blocks, device=device)[:, None] * ctx.block_q // span * span
    low = (start - local).clamp(min=0) // block
    high = (start + span + local - 1).clamp(max=tokens - 1) // block
    width = min(-(-(span + 2 * local) // block) + 1, ctx.k_blocks)
    near = low + torch.arange(width, device=device)
    counts = (near <= high) & (near >= first)
    sinks = torch.arange(first, device=device).expand(ctx.q_blocks, -1)
    ids = torch.cat((sinks, near.clamp(max=ctx.k_blocks - 1)), 1)
    return ids, torch.cat((torch.ones_like(sinks, dtype=torch.bool), counts), 1)


def anchor_region(ids: Tensor, counts: Tensor, key_blocks: int) -> Tensor:
    """Blocks of :func:`anchor_blocks` as a mask, bool ``[Qb, Kb]``."""
    region = torch.zeros(ids.shape[0], key_blocks + 1, dtype=torch.bool, device=ids.device)
    return region.scatter_(1, ids.where(counts, key_blocks), True)[:, :key_blocks]


def anchor_softmax(
    ctx: PlanContext, queries: Tensor, cols: Tensor, seen: Tensor, ids: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """Maximum and log-sum-exp of each query over the keys of its anchor.

    Args:
        ctx: sizes and the scale.
        queries: ``[B, H, S, D]`` in block order.
        cols: ``[B, H, Kb * block_k, D]`` keys in whole blocks.
        seen: bool ``[B|1, 1, Kb * block_k]``.
        ids: int64 ``[Qb, A]`` from :func:`anchor_blocks`.
        counts: bool ``[Qb, A]``.

    Returns:
        Two float32 ``[B, H, Qb * block_q]``, natural logarithm; ``-inf`` for queries whose anchor holds no valid key.
        Values behind the last query have no meaning.
    """
    batch, heads, tokens, dim = queries.shape
    blocks = cols.unflatten(2, (-1, ctx.block_k))
    rows = torch.nn.functional.pad(queries, (0, 0, 0, -tokens % ctx.block_q)).unflatten(2, (-1, ctx.block_q))
    seen_blocks = seen.unflatten(2, (-1, ctx.block_k))
    step = max(1, CHUNK_ELEMENTS // (batch * heads * ids.shape[1] * ctx.block_k * max(dim, ctx.block_q)))
    top, lse = [], []
    for first in range(0, ctx.q_blocks, step):
        some = slice(first, first + step)
        picked = blocks[:, :, ids[some]].flatten(3, 4).float()  # [B, H, rows, A * bk, D]
        visible = (seen_blocks[:, :, ids[some]] & counts[some, :, None]).flatten(3, 4)
        logits = rows[:, :, some].float() @ picked.mT * ctx.scale
        logits = logits.masked_fill(~visible[..., None, :], -torch.inf)
        top.append(logits.amax(-1).flatten(2))
        lse.append(logits.logsumexp(-1).flatten(2))
    ctx.spend(0.5 * ids.shape[1] * ctx.block_k / ctx.key.shape[2])
    return torch.cat(top, 2), torch.cat(lse, 2)
