"""Streaming heads: a sink and a local window (LServe, arXiv 2502.14866; MInference's A-shape, arXiv 2407.02490)."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.pattern._diagonals import band, first_tokens
from dit_accel.pattern._fit import computed_share, nearest
from dit_accel.pattern._registry import PATTERNS, Pattern, PatternContext


@PATTERNS.register("streaming", paper="arXiv 2502.14866", needs_grid=False)
def streaming(ctx: PatternContext, sink: int = 128, local: int = 4096) -> Pattern:
    """Every token sees the first ``sink`` visual tokens and the ``local`` tokens around it.

    Language models look back ``local`` tokens; here half of them lie on either side, as attention is not causal. LServe
    gives streaming to half of the heads, found by training; here every head has it, as in MInference's A-shape.

    Args:
        ctx: the pattern's context.
        sink: tokens at the start that everybody sees. Under a density it is never longer than one side of the window.
        local: tokens of the window, used where no density is given.

    Raises:
        ValueError: a value is negative or no whole number.
    """
    for name, value in (("sink", sink), ("local", local)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{name} must be a number of tokens of at least 0, got {value!r}")
    if ctx.density is None:
        return Pattern(_levels(ctx, local // 2 + 1, sink))
    step = min(ctx.block_q, ctx.block_k)

    def levels(place: int) -> Tensor:
        return _levels(ctx, place * step, min(sink, place * step))

    count = -(-ctx.geometry.tokens // step) + 1
    return Pattern(levels(nearest(count, lambda place: computed_share(ctx, levels(place)), ctx.density)))


def _levels(ctx: PatternContext, width: int, sink: int) -> Tensor:
    return (band(ctx, width) | first_tokens(ctx, sink)).to(torch.uint8)[None, None]
