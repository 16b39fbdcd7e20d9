"""Counting the tile pairs that a window visits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.geometry import Grid, TokenGeometry
from dit_accel.order import order_index
from dit_accel.windows import LEVEL_FULL, LEVEL_NONE, AxisWindow, WindowSpec, axis_codes, window_levels

__all__ = ["AxisTiles", "TileCounts", "axis_tiles", "brick_counts", "sequence_counts"]


@dataclass(frozen=True)
class TileCounts:
    """Pairs of a tile of queries and a tile of keys, by what a window shows of them.

    Attributes:
        tiling: how tokens fall into tiles, in words.
        tile_q: tokens of a query tile, padding included.
        tile_k: tokens of a key tile, padding included.
        pairs: all tile pairs.
        visited: pairs in which some query sees some key; a kernel computes these.
        full: visited pairs in which all queries see all keys, so that no mask is needed.
        tokens: tokens of the sequence, without padding.
    """

    tiling: str
    tile_q: int
    tile_k: int
    pairs: int
    visited: int
    full: int
    tokens: int

    @property
    def partial(self) -> int:
        """Visited pairs that need a mask."""
        return self.visited - self.full

    @property
    def full_share(self) -> float:
        """Share of the visited pairs that are full."""
        return self.full / self.visited

    @property
    def bound(self) -> float:
        """Speed-up over dense attention in the same tiles if every tile pair costs the same time."""
        return self.pairs / self.visited

    @property
    def padded_bound(self) -> float:
        """Speed-up over dense attention without padding, where ragged tiles cost as much as whole ones."""
        return self.tokens**2 / (self.visited * self.tile_q * self.tile_k)


@dataclass(frozen=True, eq=False)
class AxisTiles:
    """Tile pairs of one axis.

    Attributes:
        visited: bool ``[Tq, Tk]``, some query of the tile sees some key of the tile.
        full: bool ``[Tq, Tk]``, all see all.
    """

    visited: Tensor
    full: Tensor


def axis_tiles(axis: AxisWindow, tile_q: int, tile_k: int) -> AxisTiles:
    """Tile pairs of an axis. With a dilation each residue has tiles of its own, as in NATTEN's token permutation.

    What the queries of a tile see together is an interval, since the windows of neighbours overlap or touch; so a tile of
    keys is visited iff it meets the interval from the least to the largest key, and full iff it lies inside all windows.
    """
    code, lo, hi = axis_codes(axis)
    group = -(-axis.length // axis.dilation)
    q_tiles, k_tiles = -(-group // tile_q), -(-group // tile_k)
    residue, place = code // group, code % group
    number = residue * q_tiles + place // tile_q
    count = axis.dilation * q_tiles
    low, high = (torch.full((count,), axis.dilation * group).scatter_reduce_(0, number, x, "amin") for x in (lo, hi))
    low_most, high_most = (
        torch.zeros(count, dtype=torch.int64).scatter_reduce_(0, number, x, "amax") for x in (lo, hi)
    )
    keys = torch.arange(axis.dilation * k_tiles)
    base, start = keys // k_tiles * group, keys % k_tiles * tile_k
    members = torch.bincount(residue, minlength=axis.dilation)[keys // k_tiles]
    first, last = base + start, base + torch.minimum(start + tile_k, members)
    real = (torch.bincount(number, minlength=count) > 0)[:, None] & (last > first)
    visited = (low[:, None] < last) & (high_most[:, None] > first) & real
    full = (low_most[:, None] <= first) & (high[:, None] >= last) & real
    return AxisTiles(visited, full)


def brick_counts(tiles: Sequence[AxisTiles], tile_q: Grid, tile_k: Grid, tokens: int) -> TileCounts:
    """Tile pairs of bricks: a pair is visited iff it is on every axis, and full iff it is on every axis."""
    words = " and ".join("x".join(map(str, tile)) for tile in dict.fromkeys((tile_q, tile_k)))
    return TileCounts(
        tiling=f"bricks of {words}",
        tile_q=math.prod(tile_q),
        tile_k=math.prod(tile_k),
        pairs=math.prod(t.visited.numel() for t in tiles),
        visited=math.prod(int(t.visited.sum()) for t in tiles),
        full=math.prod(int(t.full.sum()) for t in tiles),
        tokens=tokens,
    )


def sequence_counts(geometry: TokenGeometry, spec: WindowSpec, block_q: int, block_k: int, order: str) -> TileCounts:
    """Tile pairs of runs of tokens of the sequence, in the order that ``order`` names.

    Raises:
        ValueError: an unknown order, or one that does not apply.
    """
    levels = window_levels(geometry, spec, order_index(order, geometry), block_q, block_k)
    runs = str(block_q) if block_q == block_k else f"{block_q} and {block_k}"
    return TileCounts(
        tiling=f"runs of {runs} in {order} order",
        tile_q=block_q,
        tile_k=block_k,
        pairs=levels.numel(),
        visited=int((levels != LEVEL_NONE).sum()),
        full=int((levels == LEVEL_FULL).sum()),
        tokens=geometry.tokens,
    )
