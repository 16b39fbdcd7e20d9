"""Bricks of pictures: a candidate that only single frames have."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.geometry import Grid
from dit_accel.order.brick import brick_size, tile_numbers
from dit_accel.order.morton import morton
from dit_accel.order.registry import ORDERS


@ORDERS.register("brick2d")
def brick2d(grid: Grid, size: tuple[int, ...] | None = None) -> Tensor:
    """Tiles of a picture, 8 x 8 tokens if not given; raster order for a video.

    The six axis orders of a video are two on one frame, lines and columns, and a block of either is a strip. Among the
    candidates of a method this order takes their place there. For a video it is the same as ``fhw``, and candidates that
    fall together count once. Within a tile tokens go along a Z (Morton), so that blocks of a part of a tile are near to
    squares too.

    Args:
        grid: frames, height and width.
        size: tokens of a brick along ``(H, W)``.

    Returns:
        int64 ``[F*H*W]``.

    Raises:
        ValueError: ``size`` does not have two or three entries of at least 1.
    """
    if grid[0] != 1:
        return torch.arange(grid[0] * grid[1] * grid[2])
    _, high, wide = brick_size(grid, size)
    inside = morton((1, high, wide))
    rank = torch.empty_like(inside)
    rank[inside] = torch.arange(inside.numel())
    place = torch.arange(grid[1])[:, None] % high * wide + torch.arange(grid[2]) % wide
    tile, _ = tile_numbers(grid, (1, high, wide))
    return torch.argsort(tile * inside.numel() + rank[place].reshape(-1), stable=True)
