"""Bricks: small boxes of the grid, each contiguous in the sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.geometry import Grid
from dit_accel.order.registry import ORDERS

__all__ = ["brick_size", "tile_numbers"]


@ORDERS.register("brick", paper="arXiv 2502.04507")
def brick(grid: Grid, size: tuple[int, ...] | None = None, dilation: int | tuple[int, ...] = 1) -> Tensor:
    """Tiles of the grid, in raster order inside and between.

    The tiles at the far edges are smaller where the size does not divide the grid; their tokens stay together too, so
    nothing is padded. A brick of exactly one block of tokens makes window masks block-sparse.

    Args:
        grid: frames, height and width.
        size: tokens of a brick along ``(T, H, W)``, or ``(H, W)`` for bricks of one frame; larger than the grid means
            the whole axis. Left out, a brick is a block of 64 tokens: 4x4x4, or 8x8 for images.
        dilation: distance of neighbouring tokens of a brick along each axis, so that a dilated window (DiNA) is
            block-sparse; one number for height and width of an image, and for all axes of a video.

    Returns:
        int64 ``[F*H*W]``.

    Raises:
        ValueError: ``size`` or ``dilation`` does not have two or three entries of at least 1.
    """
    shape = brick_size(grid, size)
    steps = (dilation,) * 3 if isinstance(dilation, int) else dilation
    steps = _three(steps, "dilation of a brick must be one number, TxHxW or HxW", "1x2x2")
    f, h, w = (
        _tiles(length, tile, min(step, length)).view([-1 if a == axis else 1 for a in range(3)])
        for axis, (length, tile, step) in enumerate(zip(grid, shape, steps, strict=True))
    )
    tile = (f * (int(h.max()) + 1) + h) * (int(w.max()) + 1) + w
    return torch.argsort(tile.reshape(-1), stable=True)


def brick_size(grid: Grid, size: tuple[int, ...] | None) -> Grid:
    """Tokens of a brick along frames, height and width, by the rules of the order ``brick``.

    Raises:
        ValueError: ``size`` does not have two or three entries of at least 1.
    """
    if size is None:
        size = (4, 4, 4) if grid[0] > 1 else (8, 8)
    return _three(size, "size of a brick must be TxHxW or HxW", "4x4x4")


def tile_numbers(grid: Grid, size: Grid) -> tuple[Tensor, Grid]:
    """Tile of each visual token in raster order, int64 ``[F*H*W]``, and the number of tiles along each axis."""
    f, h, w = (_tiles(length, tile, 1) for length, tile in zip(grid, size, strict=True))
    counts = (int(f[-1]) + 1, int(h[-1]) + 1, int(w[-1]) + 1)
    tile = (f[:, None, None] * counts[1] + h[:, None]) * counts[2] + w
    return tile.reshape(-1), counts


def _tiles(length: int, tile: int, step: int) -> Tensor:
    """Tile of each coordinate of an axis that falls apart into ``step`` interleaved ones."""
    place = torch.arange(length)
    group = (length + step - 1) // step
    across = (group + tile - 1) // tile
    return place % step * across + place // step // tile


def _three(value: object, expected: str, example: str) -> Grid:
    if isinstance(value, tuple) and len(value) == 2:
        value = (1, *value)
    if not isinstance(value, tuple) or len(value) != 3 or not all(_positive(t) for t in value):
        raise ValueError(f"{expected} with entries of at least 1, such as {example}, got {value!r}")
    return value


def _positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
