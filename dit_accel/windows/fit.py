"""Windows that meet a density, and windows that fit the tiles of a kernel."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dit_accel.geometry import Grid, TokenGeometry
from dit_accel.windows.rule import AxisWindow, WindowSpec, axis_codes

__all__ = [
    "dilated_by_share",
    "exact_strides",
    "is_exact",
    "snap",
    "visible_fraction",
    "window_for_density",
    "windows_by_share",
]


def visible_fraction(geometry: TokenGeometry, spec: WindowSpec) -> float:
    """Visible query-key pairs over all pairs, extra tokens included: the density of an ideal kernel, in ``(0, 1]``."""
    pairs = 1
    for axis in spec.resolve(geometry):
        _, lo, hi = axis_codes(axis)
        pairs *= int((hi - lo).sum())
    return (pairs + geometry.tokens**2 - geometry.visual**2) / geometry.tokens**2


def window_for_density(geometry: TokenGeometry, density: float) -> Grid:
    """Window of about the same fraction of every axis whose visible pairs are nearest to ``density``.

    Windows are odd, so that they are centred on their query, unless they are the whole axis.

    Args:
        geometry: layout of the sequence.
        density: wanted :func:`visible_fraction`, in ``(0, 1]``; extra tokens are always visible and count.

    Returns:
        Window along frames, height and width.

    Raises:
        ValueError: ``density`` is outside ``(0, 1]``, or below that of the extra tokens and a window of one token.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must lie in (0, 1], got {density}")
    least = visible_fraction(geometry, WindowSpec(1))
    if density < least:
        raise ValueError(
            f"density must be at least {least:.4f} for {geometry}, since extra tokens are always visible, got {density}"
        )
    wanted = (density - 1) * geometry.tokens**2 / geometry.visual**2 + 1
    return min(windows_by_share(geometry), key=lambda w: abs(math.prod(w) / geometry.visual - wanted))


def windows_by_share(geometry: TokenGeometry) -> list[Grid]:
    """Windows of about the same fraction of every axis, from one token to the whole grid, each larger than the last."""
    breaks = sorted({k / length for length in geometry.axes for k in range(length + 1)})
    found: dict[Grid, None] = {}
    for fraction in breaks:
        frames, height, width = (_odd_window(length, fraction) for length in geometry.axes)
        found[frames, height, width] = None
    return list(found)


def dilated_by_share(geometry: TokenGeometry, dilation: Grid) -> list[Grid]:
    """Like :func:`windows_by_share`, of the tokens that a dilated window can reach on each axis."""
    reach = [length // step for length, step in zip(geometry.axes, dilation)]
    return windows_by_share(TokenGeometry((max(reach[0], 1), max(reach[1], 1), max(reach[2], 1))))


def _odd_window(length: int, fraction: float) -> int:
    window = 2 * round((fraction * length - 1) / 2) + 1
    return length if fraction * length > length - 0.5 else min(max(window, 1), length)


def snap(geometry: TokenGeometry, spec: WindowSpec, tile: Grid, tile_q: Grid | None = None) -> WindowSpec:
    """Nearest window and stride for which every tile of keys is seen whole or not at all by a tile of queries.

    With bricks of the same size as order and block (``brick:TxHxW``), no block is then partial. On an axis this holds iff
    (a) all queries of a tile have the same window and (b) every window starts and ends on borders of key tiles, or at the
    end of the axis (arXiv 2504.16922, "perfectly block-sparse"). The distance that is minimised is the change of the
    window plus the change of the stride, in tokens. Where a tile does not divide an axis, often only the whole axis is
    left.

    Args:
        geometry: layout of the sequence.
        spec: the wanted window.
        tile: key tokens of a tile along frames, height and width.
        tile_q: query tokens of a tile; like ``tile`` if not given.

    Returns:
        A window given for all three axes.

    Raises:
        ValueError: a tile is not positive, or an axis with dilation or causality cannot be made exact.
    """
    names = ("frames", "height", "width")
    axes = [
        _snap_axis(name, axis, size_k, size_q)
        for name, axis, size_k, size_q in zip(names, spec.resolve(geometry), tile, tile_q or tile)
    ]
    return WindowSpec(
        tuple(-1 if axis.window == axis.length else axis.window for axis in axes),
        tuple(axis.stride for axis in axes),
        tuple(axis.dilation for axis in axes),
        tuple(axis.causal for axis in axes),
    )


def _snap_axis(name: str, axis: AxisWindow, tile_k: int, tile_q: int) -> AxisWindow:
    if tile_k < 1 or tile_q < 1:
        raise ValueError(f"a tile must have at least 1 token of {name}, got {tile_k} keys and {tile_q} queries")
    if is_exact(axis, tile_k, tile_q):
        return axis
    if axis.causal or axis.dilation > 1:
        raise ValueError(
            f"{name} must be neither causal nor dilated to fit tiles of {tile_q} queries and {tile_k} keys, got {axis}"
        )
    best = AxisWindow(axis.length, axis.length)
    least = axis.length - axis.window + axis.stride - 1
    for change in range(least):  # of the window; beyond the best distance nothing can be nearer
        if change >= least:
            break
        for window in {axis.window - change, axis.window + change}:
            if not 1 <= window < axis.length:
                continue
            for stride in range(1, window + 1):
                distance = change + abs(stride - axis.stride)
                found = AxisWindow(axis.length, window, stride)
                if distance < least and is_exact(found, tile_k, tile_q):
                    best, least = found, distance
    return best


def exact_strides(axis: AxisWindow, tile_k: int, tile_q: int) -> list[int]:
    """Strides for which the window of ``axis`` shows tiles wholly or not at all, in rising order."""
    found = (
        AxisWindow(axis.length, axis.window, stride, axis.dilation, axis.causal) for stride in range(1, axis.window + 1)
    )
    return [axis.stride for axis in found if is_exact(axis, tile_k, tile_q)]


def is_exact(axis: AxisWindow, tile_k: int, tile_q: int) -> bool:
    """Whether every tile of keys is wholly visible or wholly invisible to every tile of queries."""
    if axis.window == axis.length and not axis.causal:
        return True
    if axis.dilation > 1:
        return tile_k == tile_q == 1
    if axis.causal:
        return _is_exact(*axis_codes(axis)[1:], tile_k, tile_q)
    before, after = axis.window // 2, axis.window - axis.window // 2 - 1
    shared = -1
    for query in range(axis.length):  # the rule once more, since most axes fail at once
        leader = min(query // axis.stride * axis.stride + axis.stride // 2, axis.length - 1)
        lo = min(max(leader, before), axis.length - 1 - after) - before
        hi = lo + axis.window
        shared = lo if query % tile_q == 0 else shared
        if lo != shared or lo % tile_k or (hi % tile_k and hi != axis.length):
            return False
    return True


def _is_exact(lo: Tensor, hi: Tensor, tile_k: int, tile_q: int) -> bool:
    length = len(lo)
    first = torch.arange(length) // tile_q * tile_q
    shared = lo.equal(lo[first]) and hi.equal(hi[first])
    return shared and not bool((lo % tile_k).any()) and not bool(((hi % tile_k != 0) & (hi != length)).any())
