"""Bricks: small boxes of the grid, each contiguous in the sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.geometry import Grid
from dit_accel.order.registry import ORDERS


@ORDERS.register("brick", paper="arXiv 2502.04507")
def brick(grid: Grid, size: tuple[int, ...] | None = None) -> Tensor:
    """Tiles of the grid, in raster order inside and between.

    The tiles at the far edges are smaller where the size does not divide the grid; their tokens stay together too, so
    nothing is padded. A brick of exactly one block of tokens makes window masks block-sparse.

    Args:
        grid: frames, height and width.
        size: tokens of a brick along ``(T, H, W)``, or ``(H, W)`` for bricks of one frame; larger than the grid means
            the whole axis. Left out, a brick is a block of 64 tokens: 4x4x4, or 8x8 for images.

    Returns:
        int64 ``[F*H*W]``.

    Raises:
        ValueError: ``size`` does not have two or three entries of at least 1.
    """
    if size is None:
        size = (4, 4, 4) if grid[0] > 1 else (8, 8)
    if isinstance(size, tuple) and len(size) == 2:
        size = (1, *size)
    if not isinstance(size, tuple) or len(size) != 3 or not all(isinstance(t, int) and t >= 1 for t in size):
        raise ValueError(
            f"size of a brick must be TxHxW or HxW with entries of at least 1, such as 4x4x4, got {size!r}"
        )
    frames, height, width = grid
    f = torch.arange(frames).view(-1, 1, 1)
    h = torch.arange(height).view(1, -1, 1)
    w = torch.arange(width).view(1, 1, -1)
    across = (-(-height // size[1]), -(-width // size[2]))
    tile = ((f // size[0]) * across[0] + h // size[1]) * across[1] + w // size[2]
    return torch.argsort(tile.reshape(-1), stable=True)
