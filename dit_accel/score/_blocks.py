"""What several rules do with blocks: limits on what they insist on, keys in whole blocks, reductions row by row."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from dit_accel.context import PlanContext
from dit_accel_kernels._common import resolve_backend
from dit_accel_kernels.scores.reduce import CHUNK_ELEMENTS, block_logits

__all__ = [
    "INSIST_SHARE",
    "largest_of_rows",
    "lowest_where",
    "own_blocks",
    "row_reductions",
    "whole_blocks",
    "within_budget",
]

#: Share of an asked density that blocks may take which a rule keeps whatever their score.
INSIST_SHARE = 0.5


def within_budget(insist: Tensor, values: Tensor, density: float | None) -> Tensor:
    """Blocks to insist on, cut to half of the density where one is asked for, so that it can be met.

    Args:
        insist: bool, broadcasts to ``[B, H, Qb, Kb]``.
        values: float32 ``[B, H, Qb, Kb]``; of too many blocks of a head, those with the largest values stay.
        density: the share of blocks that was asked for, or ``None`` for the rule as published.

    Returns:
        bool ``[B, H, Qb, Kb]``.
    """
    insist = insist.expand(values.shape)
    if density is None:
        return insist
    count = max(int(INSIST_SHARE * density * values[0, 0].numel()), 1)
    ranked = values.masked_fill(~insist, -torch.inf).flatten(2)
    best = torch.zeros_like(ranked, dtype=torch.bool).scatter_(-1, ranked.topk(count).indices, True)
    return best.view(values.shape) & insist


def lowest_where(values: Tensor, hidden: Tensor) -> Tensor:
    """Scores with those of ``hidden`` blocks set to the lowest of their head: selection takes minus infinity for 0."""
    hidden = hidden.expand(values.shape)
    least = values.masked_fill(hidden, torch.inf).amin((2, 3), keepdim=True)
    return torch.where(hidden, least, values)


def unless_finite(ctx: PlanContext) -> Tensor:
    """0 for heads whose queries and valid keys are finite, else NaN: float32 ``[B, H, 1, 1]`` to add to scores.

    For rules whose scores would not show it, so that the plan reports it all the same.
    """
    keys = ctx.key if ctx.key_valid is None else ctx.key.masked_fill(~ctx.key_valid[:, None, :, None], 0)
    ends = [end.float() for x in (ctx.query, keys) for end in torch.aminmax(x.flatten(2), dim=2, keepdim=True)]
    return sum(ends, torch.zeros_like(ends[0])).mul(0)[..., None]


def own_blocks(ctx: PlanContext) -> Tensor:
    """Key blocks that share a position with the query block, bool ``[Qb, Kb]``."""
    device = ctx.query.device
    row = torch.arange(ctx.q_blocks, device=device)[:, None] * ctx.block_q
    col = torch.arange(ctx.k_blocks, device=device) * ctx.block_k
    return (row < col + ctx.block_k) & (col < row + ctx.block_q)


def whole_blocks(keys: Tensor, block: int, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys filled up to whole blocks, contiguous ``[B, H, Kb * block, D]``, and which count, ``[B|1, 1, Kb * block]``.

    Invalid keys become 0, so that what they hold is not looked at.
    """
    tokens = keys.shape[2]
    pad = -tokens % block
    seen = torch.ones(1, tokens, dtype=torch.bool, device=keys.device) if valid is None else valid
    if valid is not None:
        keys = keys.masked_fill(~valid[:, None, :, None], 0)
    return F.pad(keys, (0, 0, 0, pad)).contiguous(), F.pad(seen, (0, pad))[:, None]


def row_reductions(
    queries: Tensor, cols: Tensor, seen: Tensor, *, block_q: int, block_k: int, scale: float
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Largest logit and log-sum-exp of each query in each key block, for a few query blocks at a time.

    Args:
        queries: ``[B, H, S, D]`` in block order.
        cols: ``[B, H, Kb * block_k, D]`` from :func:`whole_blocks`.
        seen: bool ``[B|1, 1, Kb * block_k]``.
        block_q: tokens in a query block.
        block_k: tokens in a key block.
        scale: factor of the logits.

    Yields:
        Slices of query blocks and of query tokens, and two float32 ``[B, H, tokens, Kb]``, ``-inf`` for a block of which no
        key counts. The last chunk may end with a ragged block.
    """
    batch, heads, tokens, _ = queries.shape
    step = max(1, CHUNK_ELEMENTS // (batch * heads * block_q * (cols.shape[2] // block_k)))
    backend = resolve_backend(None, queries)
    for first in range(0, -(-tokens // block_q), step):
        last = min(first + step, -(-tokens // block_q))
        part = slice(first * block_q, min(last * block_q, tokens))
        top, lse = block_logits(queries[:, :, part].contiguous(), cols, block_k, scale, seen, backend)
        yield slice(first, last), part, top, lse


def largest_of_rows(x: Tensor, block_q: int) -> Tensor:
    """Maximum over the queries of each block, ``[B, H, tokens, Kb]`` to ``[B, H, blocks, Kb]``; the last may be ragged."""
    x = F.pad(x, (0, 0, 0, -x.shape[2] % block_q), value=-torch.inf)
    found: Tensor = x.unflatten(2, (-1, block_q)).amax(3)
    return found
