"""FreeSwim's inward window (arXiv 2511.14712): every token sees as much as at the size that the model was trained on."""

from __future__ import annotations

from functools import cache

from torch import Tensor

from dit_accel.geometry import Grid, TokenGeometry
from dit_accel.pattern._fit import computed_share, nearest
from dit_accel.pattern._registry import PATTERNS, Pattern, PatternContext
from dit_accel.windows import WindowSpec, token_windows, window_levels, windows_by_share


@PATTERNS.register("inward", paper="arXiv 2511.14712", windows=True)
def inward(ctx: PatternContext, size: tuple[int, ...] = (31, 53)) -> Pattern:
    """All frames, and in space a window of the training size that is moved inwards at the borders.

    The number of visible keys is the same for every query; the rule is NATTEN's with a full temporal axis.

    Args:
        ctx: the pattern's context.
        size: tokens along ``(H, W)``. The paper's 31x53 is the smallest odd window that holds the 30x52 tokens of a frame
            of 480 x 832 pixels of Wan. A density takes the same share of both axes in its place.

    Raises:
        ValueError: ``size`` is no pair of numbers of at least 1.
    """
    if not isinstance(size, tuple) or len(size) != 2 or not all(isinstance(n, int) and n >= 1 for n in size):
        raise ValueError(f"a window must be HxW with entries of at least 1, such as 31x53, got {size!r}")
    geometry = ctx.geometry
    index = None if ctx.index is None else ctx.index.cpu()

    @cache
    def levels(window: Grid) -> Tensor:
        return window_levels(geometry, WindowSpec(window), index, ctx.block_q, ctx.block_k)

    frames, height, width = geometry.axes
    chosen = (frames, min(size[0], height), min(size[1], width))
    if ctx.density is not None:
        offered = [(frames, h, w) for _, h, w in windows_by_share(TokenGeometry((1, height, width)))]
        chosen = offered[nearest(len(offered), lambda i: computed_share(ctx, levels(offered[i])), ctx.density)]
    return Pattern(levels(chosen), token_windows(geometry, WindowSpec(chosen), index))
