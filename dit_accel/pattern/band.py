"""The band of Sparse VideoGen (arXiv 2502.01776)."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.pattern._diagonals import band as band_blocks
from dit_accel.pattern._diagonals import first_tokens, is_frame_major
from dit_accel.pattern._fit import computed_share, nearest
from dit_accel.pattern._registry import PATTERNS, Pattern, PatternContext


@PATTERNS.register("band", paper="arXiv 2502.01776")
def band(ctx: PatternContext, width: int | None = None, sink: bool = True) -> Pattern:
    """Tokens see those fewer than ``width`` positions away, and where frames follow each other the first frame.

    In frame-major order that is the spatial mask of Sparse VideoGen, in an order by position, such as ``"hwf"``, its
    temporal one. The paper rounds the width up to its blocks of 128 tokens, here every block that the band touches is
    computed whole. It solves ``density = 1 - (1 - width / S)^2`` for the width; here the width whose blocks come nearest to
    the density is taken, sink and text included.

    Args:
        ctx: the pattern's context.
        width: tokens, used where no density is given.
        sink: whether every token sees the first frame. Left out on images, and where it would take more than half of the
            density asked for.

    Raises:
        ValueError: neither a width nor a density is given.
    """
    if width is None and ctx.density is None:
        raise ValueError(f"method {ctx.method.name!r} needs a width or a density, got neither")
    frames, height, columns = ctx.geometry.axes
    first = torch.zeros(ctx.k_blocks, dtype=torch.bool)
    affordable = ctx.density is None or frames * ctx.density >= 2
    if sink and frames > 1 and affordable and is_frame_major(ctx):
        first = first_tokens(ctx, height * columns)
    if ctx.density is not None:
        step = min(ctx.block_q, ctx.block_k)
        count = -(-ctx.geometry.tokens // step) + 1

        def share(place: int) -> float:
            return computed_share(ctx, _levels(ctx, place * step, first))

        width = nearest(count, share, ctx.density) * step
    assert width is not None
    return Pattern(_levels(ctx, width, first))


def _levels(ctx: PatternContext, width: int, first: Tensor) -> Tensor:
    return (band_blocks(ctx, width) | first).to(torch.uint8)[None, None]
