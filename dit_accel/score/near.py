"""Mean pooling among visual blocks, with neighbours on the grid and the first frame kept (Jenga, arXiv 2505.16864)."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from dit_accel.context import PlanContext
from dit_accel.geometry import TokenGeometry
from dit_accel.order import inverse_index
from dit_accel.score._blocks import within_budget
from dit_accel.score._registry import SCORES, Scores

__all__ = ["adjacent_blocks", "first_frame_blocks"]


@SCORES.register("near", paper="arXiv 2505.16864")
def near(ctx: PlanContext, frames: int = 1) -> Scores:
    """Softmax over means of blocks without text; blocks that touch on the grid and the first ``frames`` are kept.

    Two blocks touch if a token of one lies within one step, along each of the three axes, of a token of the other. Images
    have no first frame to keep. Where a density is asked for, what is kept besides takes at most half of it.

    Raises:
        ValueError: without a grid, or if ``frames`` is negative.
    """
    if ctx.geometry.grid is None or frames < 0:
        raise ValueError(f"score 'near' needs a grid and at least 0 frames, got {ctx.geometry} and frames={frames}")
    mean_k, _, count = ctx.key_stats
    logits = torch.einsum("bhqd,bhkd->bhqk", ctx.query_stats.mean.float() * ctx.scale, mean_k.float())
    hidden = ctx.forced.cols | (count == 0)[:, None, None]
    values = logits.masked_fill(hidden, -torch.inf).softmax(-1)
    values = values.masked_fill(hidden.all(-1, keepdim=True), 0.0)  # nothing but text
    ctx.spend(0.5 / (ctx.block_q * ctx.block_k))
    places = _places(ctx)
    kept = torch.stack([adjacent_blocks(p, ctx.geometry, ctx.block_q, ctx.block_k) for p in places])
    if frames and ctx.geometry.is_video:
        cols = torch.stack([first_frame_blocks(p, ctx.geometry, ctx.block_k, frames) for p in places])
        kept = kept | cols[:, None]
    head = torch.zeros_like(values[0, :, 0, 0], dtype=torch.long) if ctx.order is None else ctx.order.head.long()
    return Scores(values, insist=within_budget(kept[head][None], values, ctx.density), is_mass=True)


def _places(ctx: PlanContext) -> Tensor:
    """Position in block order of each visual token in raster order, int64 ``[orders, F * H * W]``."""
    if ctx.order is None:
        return torch.arange(ctx.geometry.tokens, device=ctx.query.device)[None, ctx.geometry.visual_slice]
    return inverse_index(ctx.order.table)[:, ctx.geometry.visual_slice].long()


def adjacent_blocks(place: Tensor, geometry: TokenGeometry, block_q: int, block_k: int) -> Tensor:
    """Which query and key blocks touch on the grid, corners included.

    Args:
        place: int64 ``[F * H * W]``, position in block order of each visual token.
        geometry: the grid.
        block_q: tokens in a query block.
        block_k: tokens in a key block.

    Returns:
        bool ``[Qb, Kb]``; a block touches itself.
    """
    tokens = geometry.tokens
    found = torch.zeros(-(-tokens // block_q), -(-tokens // block_k), dtype=torch.bool, device=place.device)
    grid = place.view(geometry.axes)
    for step in itertools.product((-1, 0, 1), repeat=3):
        here = grid[tuple(_overlap(s) for s in step)]
        there = grid[tuple(_overlap(-s) for s in step)]
        flat = (here // block_q * found.shape[1] + there // block_k).flatten()
        found.view(-1).index_fill_(0, flat, True)
    return found


def _overlap(step: int) -> slice:
    """Indices along an axis from which a step stays inside it."""
    return (slice(1, None), slice(None), slice(None, -1))[step + 1]


def first_frame_blocks(place: Tensor, geometry: TokenGeometry, block_k: int, frames: int) -> Tensor:
    """Key blocks that hold a token of the first ``frames``, bool ``[Kb]``."""
    found = torch.zeros(-(-geometry.tokens // block_k), dtype=torch.bool, device=place.device)
    return found.index_fill_(0, place.view(geometry.axes)[:frames].flatten() // block_k, True)
