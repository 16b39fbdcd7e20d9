"""Bands and sinks: masks along the sequence as it stands in block order."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.pattern._registry import PatternContext

__all__ = ["band", "first_tokens", "is_frame_major"]


def band(ctx: PatternContext, width: int) -> Tensor:
    """Block pairs with a token pair ``|i - j| < width`` of positions in block order, bool ``[Qb, Kb]``."""
    tokens = ctx.geometry.tokens
    q_lo, k_lo = torch.arange(0, tokens, ctx.block_q)[:, None], torch.arange(0, tokens, ctx.block_k)
    q_hi, k_hi = (q_lo + ctx.block_q).clamp(max=tokens), (k_lo + ctx.block_k).clamp(max=tokens)
    gap = torch.maximum(q_lo - k_hi, k_lo - q_hi) + 1
    return gap.clamp(min=0) < max(width, 1)


def first_tokens(ctx: PatternContext, count: int) -> Tensor:
    """Key blocks that hold one of the first ``count`` visual tokens in block order, bool ``[Kb]``."""
    visual = ctx.coordinates[0] >= 0
    flags = torch.zeros(ctx.k_blocks * ctx.block_k, dtype=torch.bool)
    flags[: len(visual)] = visual & (visual.long().cumsum(0) <= count)
    return flags.view(-1, ctx.block_k).any(1)


def is_frame_major(ctx: PatternContext) -> bool:
    """Whether visual tokens stand frame by frame in block order."""
    frames = ctx.coordinates[0]
    frames = frames[frames >= 0]
    return bool((frames[1:] >= frames[:-1]).all())
