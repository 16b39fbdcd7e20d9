"""Vertical lines and slashes (MInference, arXiv 2407.02490): columns that all queries see, and diagonals."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.choice.mse import sampled_queries
from dit_accel.context import PlanContext
from dit_accel.geometry import TokenGeometry
from dit_accel.score._registry import SCORES

__all__ = ["line_scores", "sampled_mass"]

#: Queries that are looked at; MInference takes the last 64.
SAMPLED_QUERIES = 64


def _cost(method: object, geometry: TokenGeometry) -> float:
    return 0.5 * min(SAMPLED_QUERIES / geometry.tokens, 1.0)


def sampled_mass(ctx: PlanContext, rows: Tensor) -> Tensor:
    """Softmax mass that sampled queries give each key block, exactly: float32 ``[B, H, R, Kb]``.

    Args:
        ctx: the plan's context.
        rows: int64 ``[R]``, positions in block order.
    """
    batch, heads, tokens, _ = ctx.query.shape
    block = ctx.block_k
    found = torch.zeros(batch, heads, len(rows), ctx.k_blocks, device=ctx.query.device)
    for head in range(heads):  # by head, so that the rows of the map stay small
        logits = ctx.queries[:, head, rows].float() @ ctx.keys[:, head].float().mT * ctx.scale
        if ctx.valid is not None:
            logits = logits.masked_fill(~ctx.valid[:, None], -torch.inf)
        mass = torch.nn.functional.pad(logits.softmax(-1), (0, ctx.k_blocks * block - tokens))
        found[:, head] = mass.unflatten(-1, (-1, block)).sum(-1)
    return found


def line_scores(mass: Tensor, row_blocks: Tensor, q_blocks: int, block_q: int, block_k: int) -> Tensor:
    """Scores of blocks by the best line through them.

    A vertical line is a column of blocks ``j``; its score is the mean mass of ``j`` over the sampled queries. A slash is a
    diagonal of blocks, ``d = j - (block that the query's own position has among the key blocks)``; its score is the mean
    mass over those sampled queries that the diagonal meets. A block takes the larger score of the two, so the best blocks
    of a head are the best lines of both kinds together, each whole up to the last one.

    Args:
        mass: float32 ``[B, H, R, Kb]``.
        row_blocks: int64 ``[R]``, key block at the position of each sampled query.
        q_blocks: number of query blocks.
        block_q: tokens in a query block.
        block_k: tokens in a key block.

    Returns:
        float32 ``[B, H, q_blocks, Kb]``.
    """
    batch, heads, _, columns = mass.shape
    device = mass.device
    vertical = mass.mean(2)
    offset = torch.arange(columns, device=device) - row_blocks[:, None] + columns - 1  # [R, Kb], from 0
    total = torch.zeros(batch, heads, 2 * columns - 1, device=device)
    total.scatter_add_(-1, offset.flatten().expand(batch, heads, -1), mass.flatten(2))
    met = torch.zeros(2 * columns - 1, device=device)
    met.scatter_add_(0, offset.flatten(), torch.ones_like(offset, dtype=torch.float32).flatten())
    slash = total / met.clamp(min=1)
    first = torch.arange(q_blocks, device=device) * block_q
    own, last = first // block_k, (first + block_q - 1) // block_k
    place = torch.arange(columns, device=device)
    by_row = slash[:, :, place - own[:, None].clamp(max=columns - 1) + columns - 1]
    for step in range(1, max(1, -(-block_q // block_k)) + 1):  # a tall query block lies on several diagonals
        other = torch.minimum(own + step, last).clamp(max=columns - 1)
        by_row = torch.maximum(by_row, slash[:, :, place - other[:, None] + columns - 1])
    return torch.maximum(by_row, vertical[:, :, None])


@SCORES.register("vertical_slash", paper="arXiv 2407.02490", cost=_cost)
def vertical_slash(ctx: PlanContext) -> Tensor:
    """Block columns and block diagonals that hold most mass of 64 sampled queries; see :func:`line_scores`.

    MInference looks at the last 64 queries, which see all keys of a causal map; without causality no place of the sequence
    speaks for the others, so the queries are spread over the visual tokens. Its budgets, 1000 columns and 6096 diagonals of
    single tokens, become one share of blocks for both kinds of lines, with ``select="top_k_head"``. The diagonal
    through the queries themselves always ranks first, as MInference keeps it.
    """
    rows = sampled_queries(ctx.geometry, ctx.query.device)
    if ctx.order is not None:
        rows = rows - ctx.geometry.prefix  # visual tokens stand first in block order
    mass = sampled_mass(ctx, rows)
    scores = line_scores(mass, rows // ctx.block_k, ctx.q_blocks, ctx.block_q, ctx.block_k)
    ctx.spend(0.5 * len(rows) / ctx.query.shape[2])
    return scores + _diagonal(ctx)


def _diagonal(ctx: PlanContext) -> Tensor:
    """1 on blocks with a query at its own position, else 0: float32 ``[Qb, Kb]``."""
    device = ctx.query.device
    first = torch.arange(ctx.q_blocks, device=device)[:, None] * ctx.block_q
    place = torch.arange(ctx.k_blocks, device=device) * ctx.block_k
    return ((place < first + ctx.block_q) & (place + ctx.block_k > first)).float()
