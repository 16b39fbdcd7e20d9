"""Sliding Tile Attention (arXiv 2502.04507): the window moves tile by tile, so that no block is partial."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from dit_accel.geometry import Grid
from dit_accel.pattern._fit import computed_share, nearest, one_axis_at_a_time
from dit_accel.pattern._registry import PATTERNS, Pattern, PatternContext
from dit_accel.pattern._tiles import Tiles, along_axes
from dit_accel.windows import AxisInterval, AxisWindow, axis_codes

__all__ = ["tile_windows"]

_MOST_CANDIDATES = 24
Size = tuple[int, ...]


def visible_tiles(counts: Grid, window: Grid) -> Tensor:
    """Which key tiles a query tile sees, bool ``[T, T]``.

    On each axis with ``n`` tiles a query tile ``t`` sees ``w`` tiles, ``c - w // 2`` up to ``c - w // 2 + w - 1`` with
    ``c`` the tile moved inwards at the borders, NATTEN's rule with tiles in the place of tokens.
    """
    masks = []
    for count, width in zip(counts, window, strict=True):
        seen = AxisInterval(*axis_codes(AxisWindow(count, min(width, count))))
        place = torch.arange(count)
        masks.append((place >= seen.lo[:, None]) & (place < seen.hi[:, None]))
    f, h, w = along_axes(masks, counts)
    total = math.prod(counts)
    return (f & h & w).reshape(total, total)


def tile_windows(counts: Grid) -> list[Grid]:
    """Windows of about the same share of every axis, in tiles, from one tile to all."""
    breaks = sorted({k / count for count in counts for k in range(1, count + 1)})
    found = dict.fromkeys(tuple(max(round(share * count), 1) for count in counts) for share in (0.0, *breaks))
    return [(f, h, w) for f, h, w in found]


def candidates(ctx: PatternContext, window: Size | None = None, tile: Size | None = None) -> list[Pattern]:
    """Windows of different shapes and about the same cost, for a search per head.

    They are the largest ones within the density: no axis can take one more tile. Where there are more than
    24, evenly spread ones are kept. The paper searches a handful of hand-picked shapes of equal cost.

    Raises:
        ValueError: without a density.
    """
    if ctx.density is None:
        raise ValueError("a search of windows needs a density, got None")
    tiles = Tiles(ctx, tile)
    budget, counts = ctx.density * tiles.total, tiles.counts
    shapes = []
    for frames in range(1, counts[0] + 1):
        for height in range(1, counts[1] + 1):
            width = min(int(budget / (frames * height) + 1e-9), counts[2])
            grown = [(frames + 1) * height, frames * (height + 1)]
            free = [grown[0] if frames < counts[0] else None, grown[1] if height < counts[1] else None]
            if width and not any(area and area * width <= budget for area in free):
                shapes.append((frames, height, width))
    shapes = shapes or [(1, 1, 1)]
    keep = sorted({round(i * (len(shapes) - 1) / (_MOST_CANDIDATES - 1)) for i in range(_MOST_CANDIDATES)})
    return [Pattern(tiles.levels(visible_tiles(counts, shapes[i]))) for i in keep]


@PATTERNS.register("sta", paper="arXiv 2502.04507", candidates=candidates)
def sta(ctx: PatternContext, window: Size | None = None, tile: Size | None = None) -> Pattern:
    """Tiles of the grid see the tiles of a window around them, whole.

    Args:
        ctx: the pattern's context.
        window: tiles of the window along ``(T, H, W)`` or ``(H, W)``; used where no density is given, which otherwise
            decides.
        tile: tokens of a tile; as in the order ``brick``, which should be given the same.

    Raises:
        ValueError: neither a window nor a density is given, or a value does not fit.
    """
    tiles = Tiles(ctx, tile)
    if ctx.density is None:
        if window is None:
            raise ValueError(f"method {ctx.method.name!r} needs a window in tiles or a density, got neither")
        return Pattern(tiles.levels(visible_tiles(tiles.counts, _three(window))))
    shapes = one_axis_at_a_time(tile_windows(tiles.counts))

    @cache
    def levels(place: int) -> Tensor:
        return tiles.levels(visible_tiles(tiles.counts, shapes[place]))

    return Pattern(levels(nearest(len(shapes), lambda place: computed_share(ctx, levels(place)), ctx.density)))


def _three(window: object) -> Grid:
    value = (1, *window) if isinstance(window, tuple) and len(window) == 2 else window
    if not isinstance(value, tuple) or len(value) != 3 or not all(isinstance(n, int) and n >= 1 for n in value):
        raise ValueError(f"a window in tiles must be TxHxW or HxW with entries of at least 1, got {window!r}")
    return value
