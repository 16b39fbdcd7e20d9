"""Blocked local attention with a halo (HaloNet, arXiv 2103.12731)."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from dit_accel.geometry import Grid, TokenGeometry
from dit_accel.order.brick import brick_size
from dit_accel.pattern._fit import computed_share, nearest, one_axis_at_a_time
from dit_accel.pattern._registry import PATTERNS, Pattern, PatternContext
from dit_accel.windows import AxisInterval, interval_levels, interval_windows


def halo_intervals(geometry: TokenGeometry, size: tuple[int, ...] | None, halo: Grid) -> list[AxisInterval]:
    """What each coordinate sees: its block of ``size`` tokens and ``halo`` tokens on either side, cut at the borders."""
    found = []
    for length, block, width in zip(geometry.axes, brick_size(geometry.axes, size), halo, strict=True):
        place = torch.arange(length)
        first = place // block * block
        found.append(AxisInterval(place, (first - width).clamp(min=0), (first + block + width).clamp(max=length)))
    return found


@PATTERNS.register("halo", paper="arXiv 2103.12731", windows=True)
def halo(ctx: PatternContext, halo: int = 3, size: tuple[int, ...] | None = None) -> Pattern:
    """All queries of a block see the block and ``halo`` tokens around it on every axis.

    Windows are cut at the borders, where the paper pads with zeros.

    Args:
        ctx: the pattern's context.
        halo: tokens on either side, where no density is given. The paper's models have blocks of 8 with a halo of 3. A
            density makes it as wide on all axes, or one token wider on the last ones.
        size: tokens of a block along ``(T, H, W)`` or ``(H, W)``; as in the order ``brick``.

    Raises:
        ValueError: a value does not fit.
    """
    if isinstance(halo, bool) or not isinstance(halo, int) or halo < 0:
        raise ValueError(f"halo must be a number of tokens of at least 0, got {halo!r}")
    index = None if ctx.index is None else ctx.index.cpu()

    @cache
    def levels(width: Grid) -> Tensor:
        intervals = halo_intervals(ctx.geometry, size, width)
        return interval_levels(ctx.geometry, intervals, index, ctx.block_q, ctx.block_k)

    chosen = (halo, halo, halo)
    if ctx.density is not None:
        offered = one_axis_at_a_time([(n, n, n) for n in range(max(ctx.geometry.axes))])
        chosen = offered[nearest(len(offered), lambda i: computed_share(ctx, levels(offered[i])), ctx.density)]
    return Pattern(levels(chosen), interval_windows(ctx.geometry, halo_intervals(ctx.geometry, size, chosen), index))
