"""Neighbourhoods in the sense of NATTEN: windows, strides, dilation, causal axes.

arXiv 2204.07143, 2209.15001, 2504.16922.
"""

from __future__ import annotations

import math

from torch import Tensor

from dit_accel.pattern._registry import PATTERNS, Pattern, PatternContext
from dit_accel.windows import WindowSpec, token_windows, window_levels, windows_by_share


@PATTERNS.register("window", paper="arXiv 2504.16922", windows=True)
def window(ctx: PatternContext) -> Pattern:
    """The neighbourhood of the method's ``window``, ``stride``, ``dilation`` and ``causal``, or of a density.

    Raises:
        ValueError: if the window does not fit the grid, or neither a window nor a density is given.
    """
    index = None if ctx.index is None else ctx.index.cpu()
    method = ctx.method
    if method.window is not None:
        spec = _spec(ctx, method.window)
        levels = window_levels(ctx.geometry, spec, index, ctx.block_q, ctx.block_k)
    elif ctx.density is None:
        raise ValueError(f"method {method.name!r} needs a window or a density, got neither")
    else:
        spec, levels = _nearest(ctx, index, ctx.density)
    return Pattern(levels, token_windows(ctx.geometry, spec, index))


def _spec(ctx: PatternContext, size: int | tuple[int, ...]) -> WindowSpec:
    """The neighbourhood of a window; a scalar stride is cut to it on axes where it is longer."""
    stride = ctx.method.stride
    if not isinstance(stride, tuple) and isinstance(size, tuple):
        stride = tuple(stride if length < 1 else min(stride, length) for length in size)
    elif not isinstance(stride, tuple) and isinstance(size, int) and size > 0:
        stride = min(stride, size)
    return WindowSpec(size, stride, ctx.method.dilation, ctx.method.causal)


def _nearest(ctx: PatternContext, index: Tensor | None, density: float) -> tuple[WindowSpec, Tensor]:
    """The equal-share window whose visited blocks come nearest to ``density``; of several, the one that sees most.

    Visited blocks are what a kernel computes; on small grids they are far more than visible pairs. A window that is one
    token wide on every axis longer than that is no neighbourhood and is not offered. Density 1 is the whole grid.
    """
    axes = ctx.geometry.axes
    shares = windows_by_share(ctx.geometry)
    offered = [w for w in shares if all(size >= min(3, n) for size, n in zip(w, axes, strict=True))]

    def visit(place: int) -> tuple[float, WindowSpec, Tensor]:
        spec = _spec(ctx, offered[place])
        levels = window_levels(ctx.geometry, spec, index, ctx.block_q, ctx.block_k)
        return (levels > 0).float().mean().item(), spec, levels

    low, high = 0, len(offered) - 1
    if density >= 1:
        return visit(high)[1:]
    while low < high:  # the last window that stays within the density
        middle = (low + high + 1) // 2
        low, high = (middle, high) if visit(middle)[0] <= density else (low, middle - 1)
    best = visit(low)
    for place in range(low + 1, len(offered)):  # the next larger visit, and all windows that visit no more than it
        tried = visit(place)
        if abs(math.log(tried[0] / density)) > abs(math.log(best[0] / density)):
            break
        best = tried
    return best[1:]
