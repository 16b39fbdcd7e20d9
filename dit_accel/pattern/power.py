"""PowerAttention (arXiv 2503.03588): besides near keys, those at distances that are powers of two.

In the paper a causal sequence sees its neighbourhood and the blocks ``1, 2, 4, 8, ...`` blocks back, so that everything
reaches everything within ``log2`` layers at a cost of ``log2`` blocks a row. Here attention is not causal and positions
have three axes, so distances count in both directions and per axis, in tiles.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from dit_accel.geometry import Grid
from dit_accel.pattern._fit import computed_share, nearest, one_axis_at_a_time
from dit_accel.pattern._registry import PATTERNS, Pattern, PatternContext
from dit_accel.pattern._tiles import Tiles, along_axes

Reach = tuple[Grid, int]
"""Local radius in tiles along each axis, and the exponent of the largest power of two, -1 for none."""


def visible_tiles(counts: Grid, reach: Reach) -> Tensor:
    """Which key tiles a query tile sees, bool ``[T, T]``.

    With per-axis distances ``d``, a key is seen iff ``|d| <= radius`` on every axis, or on all but one, on which ``|d|`` is
    one of ``1, 2, 4 .. 2^most``.
    """
    radius, most = reach
    local, power = [], []
    for count, width in zip(counts, radius, strict=True):
        place = torch.arange(count)
        distance = (place[:, None] - place).abs()
        local.append(distance <= width)
        power.append(((distance & (distance - 1)) == 0) & (distance > 0) & (distance < 1 << (most + 1)))
    near, far = along_axes(local, counts), along_axes(power, counts)
    seen = near[0] & near[1] & near[2]
    seen = seen | (far[0] & near[1] & near[2]) | (near[0] & far[1] & near[2]) | (near[0] & near[1] & far[2])
    total = counts[0] * counts[1] * counts[2]
    return seen.reshape(total, total)


def reaches(counts: Grid) -> list[Reach]:
    """Parameters from one tile to all of them, each seeing at least what the one before it sees."""
    top = largest_power(counts)
    found: list[Reach] = [((0, 0, 0), most) for most in range(-1, top)]
    found += [(radius, top) for radius in one_axis_at_a_time([(n, n, n) for n in range(max(counts))])]
    return found


def largest_power(counts: Grid) -> int:
    """Exponent of the largest power of two that is a distance on some axis, -1 where there is no distance at all."""
    return (max(counts) - 1).bit_length() - 1


@PATTERNS.register("power", paper="arXiv 2503.03588")
def power(ctx: PatternContext, radius: int = 1, tile: tuple[int, ...] | None = None) -> Pattern:
    """A neighbourhood of tiles, and along each axis the tiles at distances that are powers of two.

    A density first shortens the reach to the small powers, then widens the neighbourhood.

    Args:
        ctx: the pattern's context.
        radius: tiles of the neighbourhood on either side, where no density is given.
        tile: tokens of a tile; as in the order ``brick``, which should be given the same.

    Raises:
        ValueError: ``radius`` is negative, or ``tile`` does not fit.
    """
    if isinstance(radius, bool) or not isinstance(radius, int) or radius < 0:
        raise ValueError(f"radius must be a number of tiles of at least 0, got {radius!r}")
    tiles = Tiles(ctx, tile)
    offered = reaches(tiles.counts)
    if ctx.density is None:
        reach = ((radius, radius, radius), largest_power(tiles.counts))
        return Pattern(tiles.levels(visible_tiles(tiles.counts, reach)))

    @cache
    def levels(place: int) -> Tensor:
        return tiles.levels(visible_tiles(tiles.counts, offered[place]))

    return Pattern(levels(nearest(len(offered), lambda place: computed_share(ctx, levels(place)), ctx.density)))
