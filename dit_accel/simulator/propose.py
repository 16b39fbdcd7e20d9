"""Windows, strides and tiles that fit together: no visited tile is partial."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from dit_accel.geometry import Grid, TokenGeometry
from dit_accel.simulator.simulation import Axes, Simulation, as_tile, simulate
from dit_accel.windows import AxisWindow, WindowSpec, exact_strides, snap

__all__ = ["Proposal", "propose"]


@dataclass(frozen=True)
class Proposal:
    """A perfectly block-sparse window near the one that was asked for.

    Attributes:
        window: tokens seen on frames, height and width.
        stride: queries that share a window.
        tile: tokens of a tile of queries and of keys.
        distance: change of the window plus change of the stride, in tokens over all axes.
        simulation: counts and bounds.
    """

    window: Grid
    stride: Grid
    tile: Grid
    distance: int
    simulation: Simulation

    def __str__(self) -> str:
        words = ["x".join(map(str, part)) for part in (self.window, self.stride, self.tile)]
        bound = self.simulation.brick.padded_bound
        return f"window {words[0]} stride {words[1]} tile {words[2]}: {bound:.2f}x, {self.distance} tokens away"


def propose(
    grid: Sequence[int],
    window: Axes,
    stride: Axes = 1,
    *,
    tile: Sequence[int] | None = None,
    block: int = 64,
    keep_window: bool = False,
    limit: int = 5,
) -> list[Proposal]:
    """Find window, stride and tile for which every visited tile is full ("perfectly block-sparse", arXiv 2504.16922).

    An axis is exact iff (a) all queries of a tile have the same window and (b) every window starts and ends on borders of
    key tiles, or at the end of the axis. Sufficient for a window ``K`` of stride ``S`` on an axis of ``L`` tokens in tiles
    of ``t`` is that ``t`` divides ``S``, ``K``, ``K // 2 - S // 2`` and ``L - K``; here the definition decides.

    Args:
        grid: tokens along ``(F, H, W)``, ``(H, W)`` or ``(L,)``.
        window: wanted tokens on each axis; ``-1`` is the whole axis.
        stride: wanted queries that share a window.
        tile: the only tile to try; otherwise all tiles of ``block`` tokens whose sides are powers of two.
        block: tokens of a tile.
        keep_window: change the stride alone.
        limit: most proposals.

    Returns:
        Proposals, those first that show about the same share of the pairs and lose least to padding, of equal ones the
        nearest; empty if there is none.

    Raises:
        ValueError: a value does not fit the grid, or ``block`` is no power of two.
    """
    wanted = simulate(grid, window, stride, tile=tile)
    if tile is None and (block < 1 or block & (block - 1)):
        raise ValueError(f"block must be a power of two, got {block}")
    if limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    geometry = wanted.geometry
    tiles = [as_tile(geometry, tile, grid)] if tile is not None else _tiles(geometry, block)
    found = []
    for candidate in tiles:
        spec = _strides_alone(wanted, candidate) if keep_window else snap_axes(geometry, wanted.axes, candidate)
        if spec is not None:
            found.append(_proposal(wanted, spec, candidate))
    found.sort(key=lambda p: (_loss(p, wanted), p.distance))
    return found[:limit]


def _loss(proposal: Proposal, wanted: Simulation) -> float:
    """How far the visible share is from the wanted one, and what padding takes of the speed; ratios on a log scale."""
    found = proposal.simulation
    window = abs(math.log(found.visible / wanted.visible))
    return round(window + math.log(found.flop_bound / found.brick.padded_bound), 3)


def _tiles(geometry: TokenGeometry, block: int) -> list[Grid]:
    """Boxes of ``block`` tokens whose sides are powers of two, none of which is longer than its axis needs."""
    powers = [1 << i for i in range(block.bit_length())]
    most = [1 << (length - 1).bit_length() for length in geometry.axes]
    return [
        (t, h, w)
        for t in powers
        for h in powers
        for w in powers
        if t * h * w == block and t <= most[0] and h <= most[1] and w <= most[2]
    ]


def snap_axes(geometry: TokenGeometry, axes: Sequence[AxisWindow], tile: Grid) -> WindowSpec:
    """Each axis snapped on its own, and kept for other tiles with the same side."""
    parts = [_snapped(axis, side) for axis, side in zip(axes, tile, strict=True)]
    return WindowSpec(tuple(window for window, _ in parts), tuple(stride for _, stride in parts))


@lru_cache(maxsize=1024)
def _snapped(axis: AxisWindow, side: int) -> tuple[int, int]:
    line = TokenGeometry((1, 1, axis.length))
    spec = snap(line, WindowSpec((axis.window,), (axis.stride,)), (1, 1, side)).resolve(line)[2]
    return spec.window, spec.stride


def _strides_alone(wanted: Simulation, tile: Grid) -> WindowSpec | None:
    strides = []
    for axis, side in zip(wanted.axes, tile, strict=True):
        exact = exact_strides(axis, side, side)
        if not exact:
            return None
        strides.append(min(exact, key=lambda s, axis=axis: abs(s - axis.stride)))  # type: ignore[misc]
    return WindowSpec(tuple(axis.window for axis in wanted.axes), tuple(strides))


def _proposal(wanted: Simulation, spec: WindowSpec, tile: Grid) -> Proposal:
    simulation = Simulation(wanted.geometry, spec, tile, tile)
    pairs = list(zip(simulation.axes, wanted.axes, strict=True))
    # A stride has no meaning where the whole axis is seen.
    distance = sum(
        abs(found.window - asked.window) + (abs(found.stride - asked.stride) if found.window < found.length else 0)
        for found, asked in pairs
    )
    (f, fs), (h, hs), (w, ws) = ((axis.window, axis.stride) for axis in simulation.axes)
    return Proposal((f, h, w), (fs, hs, ws), tile, distance, simulation)
