"""Masks that are defined between tiles of the grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dit_accel.geometry import Grid
from dit_accel.order.brick import brick_size, tile_numbers
from dit_accel.pattern._registry import PatternContext

__all__ = ["Tiles", "along_axes"]


class Tiles:
    """The tiles of a grid and the blocks that their tokens lie in.

    A block pair is computed whole as soon as one visible tile pair touches it. Where the token order is
    ``brick`` with tiles of one block, and the tiles divide the grid, blocks and tiles are the same.

    Attributes:
        counts: number of tiles along frames, height and width; tiles are numbered in raster order.

    Args:
        ctx: the pattern's context.
        size: tokens of a tile along ``(T, H, W)`` or ``(H, W)``; like the order ``brick`` if not given.
    """

    def __init__(self, ctx: PatternContext, size: tuple[int, ...] | None) -> None:
        geometry = ctx.geometry
        tile, self.counts = tile_numbers(geometry.axes, brick_size(geometry.axes, size))
        self.total = self.counts[0] * self.counts[1] * self.counts[2]
        placed = torch.full((geometry.tokens,), -1, dtype=torch.int64)
        placed[geometry.visual_slice] = tile
        if ctx.index is not None:
            placed = placed[ctx.index.long()]
        self._rows, self._columns = self._members(placed, ctx.block_q), self._members(placed, ctx.block_k)

    def _members(self, placed: Tensor, block: int) -> Tensor:
        """Distinct tiles of each block, int64 ``[blocks, M]``; rows are filled up with ``total``, which stands for none."""
        padded = placed.new_full((-(-len(placed) // block) * block,), -1)
        padded[: len(placed)] = placed
        tiles = torch.where(padded < 0, self.total, padded).view(-1, block).sort(1).values
        new = torch.ones_like(tiles, dtype=torch.bool)
        new[:, 1:] = tiles[:, 1:] != tiles[:, :-1]
        distinct = tiles.masked_fill(~new, self.total).sort(1).values
        return distinct[:, : max(int((distinct < self.total).sum(1).max()), 1)]

    def levels(self, visible: Tensor) -> Tensor:
        """Levels of a mask between tiles, bool ``[T, T]`` (queries, keys): uint8 ``[1, 1, Qb, Kb]``."""
        padded = torch.zeros(self.total + 1, self.total + 1, dtype=torch.bool)
        padded[:-1, :-1] = visible
        rows = torch.zeros(len(self._rows), self.total + 1, dtype=torch.bool)
        for member in self._rows.T:
            rows |= padded[member]
        found = torch.zeros(len(self._rows), len(self._columns), dtype=torch.bool)
        for member in self._columns.T:
            found |= rows[:, member]
        return found.to(torch.uint8)[None, None]


def along_axes(masks: Sequence[Tensor], counts: Grid) -> list[Tensor]:
    """Masks ``[n, n]`` of the three axes, each shaped to broadcast over all pairs of tiles ``[n, n, n, n, n, n]``."""
    shaped = []
    for axis, (mask, count) in enumerate(zip(masks, counts, strict=True)):
        shape = [count if place % 3 == axis else 1 for place in range(6)]
        shaped.append(mask.reshape(shape))
    return shaped
