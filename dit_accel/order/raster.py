"""The order in which models hand over their tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.geometry import Grid
from dit_accel.order.registry import ORDERS


@ORDERS.register("raster")
def raster(grid: Grid) -> Tensor:
    """Natural order: frame by frame, row by row."""
    frames, height, width = grid
    return torch.arange(frames * height * width)
