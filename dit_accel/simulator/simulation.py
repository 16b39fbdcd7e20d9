"""A window on a grid, computed in tiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_accel.geometry import Grid, TokenGeometry
from dit_accel.order.brick import brick_size
from dit_accel.simulator.counts import AxisTiles, TileCounts, axis_tiles, brick_counts, sequence_counts
from dit_accel.windows import AxisWindow, WindowSpec, visible_fraction

if TYPE_CHECKING:
    from rich.text import Text

__all__ = ["Simulation", "as_geometry", "as_tile", "simulate"]

Axes = int | Sequence[int]


@dataclass(frozen=True)
class Simulation:
    """What :func:`simulate` found. Counts are made when they are looked at.

    Attributes:
        geometry: the grid; no extra tokens.
        spec: the window.
        tile_q: query tokens of a tile along frames, height and width.
        tile_k: key tokens of a tile.
    """

    geometry: TokenGeometry
    spec: WindowSpec
    tile_q: Grid
    tile_k: Grid

    @cached_property
    def axes(self) -> tuple[AxisWindow, AxisWindow, AxisWindow]:
        """The window on each axis, with what is meant by "full" worked out."""
        return self.spec.resolve(self.geometry)

    @cached_property
    def axis_tiles(self) -> tuple[AxisTiles, ...]:
        """Tile pairs of each axis."""
        return tuple(axis_tiles(*part) for part in zip(self.axes, self.tile_q, self.tile_k, strict=True))

    @cached_property
    def brick(self) -> TileCounts:
        """Tile pairs if every tile is a brick of the grid: NATTEN's multi-dimensional tiling, and order ``brick`` here."""
        return brick_counts(self.axis_tiles, self.tile_q, self.tile_k, self.geometry.tokens)

    @cached_property
    def raster(self) -> TileCounts:
        """Tile pairs if tiles of as many tokens are runs of the sequence, frame by frame and row by row."""
        return self.along("raster")

    def along(self, order: str, block_q: int | None = None, block_k: int | None = None) -> TileCounts:
        """Tile pairs of runs of the sequence in another order, such as ``"gilbert"``.

        Args:
            order: name of an order of :mod:`dit_accel.order`.
            block_q: query tokens of a run, as many as a tile has if not given.
            block_k: key tokens of a run.

        Raises:
            ValueError: an unknown order.
        """
        q, k = block_q or math.prod(self.tile_q), block_k or math.prod(self.tile_k)
        return sequence_counts(self.geometry, self.spec, q, k, order)

    @property
    def visible(self) -> float:
        """Share of the query-key pairs that the window shows, in ``(0, 1]``."""
        return visible_fraction(self.geometry, self.spec)

    @property
    def flop_bound(self) -> float:
        """Speed-up over dense attention if only visible pairs cost time."""
        return 1 / self.visible

    @property
    def tile_bound(self) -> float:
        """Speed-up over dense attention in bricks if each pair of bricks costs the same time."""
        return self.brick.bound

    @property
    def is_perfect(self) -> bool:
        """Whether no visited brick is partial ("perfectly block-sparse", arXiv 2504.16922)."""
        return self.brick.partial == 0

    @property
    def padding(self) -> float:
        """Tokens that bricks of queries hold over the tokens of the grid: above 1 where tiles do not divide it."""
        tiles = math.prod(t.visited.shape[0] for t in self.axis_tiles)
        return tiles * math.prod(self.tile_q) / self.geometry.tokens

    def to_dict(self, *, raster: bool = False) -> dict[str, Any]:
        """Plain JSON types; with ``raster`` the tile pairs of the sequence besides, which takes longer."""
        found: dict[str, Any] = {
            "grid": list(self.geometry.axes),
            "window": [axis.window for axis in self.axes],
            "stride": [axis.stride for axis in self.axes],
            "dilation": [axis.dilation for axis in self.axes],
            "causal": [axis.causal for axis in self.axes],
            "tile_q": list(self.tile_q),
            "tile_k": list(self.tile_k),
            "visible": self.visible,
            "flop_bound": self.flop_bound,
            "padding": self.padding,
            "perfect": self.is_perfect,
            "brick": _counts(self.brick),
        }
        if raster:
            found["raster"] = _counts(self.raster)
        return found

    def text(self, query: Sequence[int] | None = None, width: int = 100) -> Text:
        """Which bricks of keys one brick of queries visits, for a terminal; see :func:`.picture.text_picture`."""
        from dit_accel.simulator.picture import text_picture

        return text_picture(self, query, width)

    def save(self, path: str | Path, query: Sequence[int] | None = None) -> None:
        """The same as a picture file, PNG or SVG by its ending; needs matplotlib.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: another ending, or no such brick of queries.
        """
        from dit_accel.simulator.picture import save_picture

        save_picture(self, Path(path), query)

    def __str__(self) -> str:
        window = ", ".join(_axis_words(n, a) for n, a in zip(("frames", "height", "width"), self.axes, strict=True))
        brick = self.brick
        padded = f", {brick.padded_bound:.2f}x with padding" if self.padding > 1 else ""
        return (
            f"{self.geometry}: {window}\n"
            f"visible {self.visible:.2%} of the pairs, at most {self.flop_bound:.2f}x\n"
            f"{brick.tiling}: {brick.visited} of {brick.pairs} pairs visited, {brick.full_share:.1%} of them full, "
            f"at most {brick.bound:.2f}x{padded}"
        )

    def __rich__(self) -> Text:
        """The picture, with the numbers above it."""
        return self.text()


def simulate(
    grid: Sequence[int],
    window: Axes,
    stride: Axes = 1,
    dilation: Axes = 1,
    *,
    causal: bool | Sequence[bool] = False,
    tile: Sequence[int] | None = None,
    tile_q: Sequence[int] | None = None,
    tile_k: Sequence[int] | None = None,
) -> Simulation:
    """Count what a kernel computes of a neighbourhood window.

    The window follows NATTEN's rule (arXiv 2504.16922); see :class:`~dit_accel.windows.WindowSpec`.

    Args:
        grid: tokens along ``(F, H, W)``, ``(H, W)`` or ``(L,)``.
        window: tokens seen on each axis of the grid, one number for all; ``-1`` is the whole axis.
        stride: queries that share a window.
        dilation: distance of neighbouring keys.
        causal: axes on which only keys at or before the query count.
        tile: tokens of a tile along the axes of the grid; 4x4x4, 8x8 or 64 if not given.
        tile_q: another tile for the queries.
        tile_k: another tile for the keys.

    Returns:
        Counts and bounds, for bricks and for runs of the sequence.

    Raises:
        ValueError: a value does not fit the grid.
    """
    geometry = as_geometry(grid)
    values = (_axes("window", window, grid), _axes("stride", stride, grid), _axes("dilation", dilation, grid))
    spec = WindowSpec(*values, causal if isinstance(causal, bool) else tuple(causal))
    spec.resolve(geometry)
    chosen = as_tile(geometry, tile, grid)
    return Simulation(
        geometry,
        spec,
        chosen if tile_q is None else as_tile(geometry, tile_q, grid),
        chosen if tile_k is None else as_tile(geometry, tile_k, grid),
    )


def as_geometry(grid: Sequence[int]) -> TokenGeometry:
    """The geometry of a grid of one to three axes.

    Raises:
        ValueError: another number of axes, or a size below 1.
    """
    sizes = tuple(grid)
    if not 1 <= len(sizes) <= 3:
        raise ValueError(f"grid must have one to three axes, got {sizes}")
    padded = (1,) * (3 - len(sizes)) + sizes
    return TokenGeometry((padded[0], padded[1], padded[2]))


def as_tile(geometry: TokenGeometry, tile: Sequence[int] | None, grid: Sequence[int]) -> Grid:
    """A tile along frames, height and width.

    Raises:
        ValueError: another number of axes than the grid has, or a size below 1.
    """
    if tile is None:
        return (1, 1, 64) if len(grid) == 1 else brick_size(geometry.axes, None)
    sizes = tuple(tile)
    if len(sizes) != len(grid) or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in sizes):
        raise ValueError(f"a tile of this grid must have {len(grid)} sizes of at least 1, got {sizes}")
    padded = (1,) * (3 - len(sizes)) + sizes
    return (padded[0], padded[1], padded[2])


def _axes(name: str, value: Axes, grid: Sequence[int]) -> int | tuple[int, ...]:
    if isinstance(value, int):
        return value
    if len(value) != len(grid):
        raise ValueError(f"{name} must be one number or have {len(grid)}, like the grid, got {tuple(value)}")
    return tuple(value)


def _counts(counts: TileCounts) -> dict[str, Any]:
    return {
        "tiling": counts.tiling,
        "pairs": counts.pairs,
        "visited": counts.visited,
        "full": counts.full,
        "partial": counts.partial,
        "bound": counts.bound,
        "padded_bound": counts.padded_bound,
    }


def _axis_words(name: str, axis: AxisWindow) -> str:
    words = f"{name} {axis.window} of {axis.length}"
    if axis.stride > 1:
        words += f" stride {axis.stride}"
    if axis.dilation > 1:
        words += f" dilation {axis.dilation}"
    return words + (" causal" if axis.causal else "")
