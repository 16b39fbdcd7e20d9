"""Neighbourhoods in the sense of NATTEN: windows, strides, dilation, causal axes.

arXiv 2204.07143, 2209.15001, 2504.16922.
"""

from __future__ import annotations

from functools import cache

from torch import Tensor

from dit_accel.geometry import Grid
from dit_accel.pattern._fit import computed_share, nearest
from dit_accel.pattern._registry import PATTERNS, Pattern, PatternContext
from dit_accel.windows import WindowSpec, dilated_by_share, token_windows, window_levels

Size = int | tuple[int, ...]
Visit = tuple[float, WindowSpec, Tensor]


@PATTERNS.register("window", paper="arXiv 2504.16922", windows=True)
def window(ctx: PatternContext) -> Pattern:
    """The neighbourhood of the method's ``window``, ``stride``, ``dilation`` and ``causal``, or of a density.

    Raises:
        ValueError: if the window does not fit the grid, or neither a window nor a density is given.
    """
    index = None if ctx.index is None else ctx.index.cpu()
    method = ctx.method
    if method.window is not None:
        spec = _spec(ctx, method.window, method.dilation)
        levels = window_levels(ctx.geometry, spec, index, ctx.block_q, ctx.block_k)
    elif ctx.density is None:
        raise ValueError(f"method {method.name!r} needs a window or a density, got neither")
    else:
        spec, levels = _nearest(ctx, index, ctx.density)
    return Pattern(levels, token_windows(ctx.geometry, spec, index))


def _spec(ctx: PatternContext, size: Size, dilation: Size) -> WindowSpec:
    """The neighbourhood of a window; a scalar stride is cut to it on axes where it is longer."""
    stride = ctx.method.stride
    if not isinstance(stride, tuple) and isinstance(size, tuple):
        stride = tuple(stride if length < 1 else min(stride, length) for length in size)
    elif not isinstance(stride, tuple) and isinstance(size, int) and size > 0:
        stride = min(stride, size)
    return WindowSpec(size, stride, dilation, ctx.method.causal)


def _nearest(ctx: PatternContext, index: Tensor | None, density: float) -> tuple[WindowSpec, Tensor]:
    """The equal-share window whose visited blocks come nearest to ``density``; of several, the one that sees most.

    Visited blocks are what a kernel computes; on small grids they are far more than visible pairs. A window that is one
    token wide on every axis longer than that is no neighbourhood and is not offered. Density 1 is the whole grid.

    A dilated window reaches ``1 / dilation`` of the tokens of an axis at most. Where the density asks for more, the
    dilation is given up axis by axis, frames first, where that comes nearer to it.
    """
    found = []
    for dilation in _dilations(ctx):
        axes = [length // step for length, step in zip(ctx.geometry.axes, dilation, strict=True)]
        shares = dilated_by_share(ctx.geometry, dilation)
        offered = [w for w in shares if all(size >= min(3, n) for size, n in zip(w, axes, strict=True))]

        @cache
        def visit(place: int, sizes: tuple[Grid, ...] = tuple(offered), step: Grid = dilation) -> Visit:
            spec = _spec(ctx, sizes[place], step)
            levels = window_levels(ctx.geometry, spec, index, ctx.block_q, ctx.block_k)
            return computed_share(ctx, levels), spec, levels

        found.append(visit(nearest(len(offered), lambda place: visit(place)[0], density)))
        if visit(len(offered) - 1)[0] >= density:
            break
    best = found[nearest(len(found), lambda place: found[place][0], density)]
    return best[1:]


def _dilations(ctx: PatternContext) -> list[Grid]:
    """The method's dilation, and what is left of it when the first axes give it up; the last is none."""
    value = ctx.method.dilation
    given = (value,) * 3 if isinstance(value, int) else (1,) * (3 - len(value)) + value
    frames, height, width = (
        min(step, max(length // min(length, 3), 1)) for step, length in zip(given, ctx.geometry.axes, strict=True)
    )
    found = [(frames, height, width), (1, height, width), (1, 1, width), (1, 1, 1)]
    return list(dict.fromkeys(found))
