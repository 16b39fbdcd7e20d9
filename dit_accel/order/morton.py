"""The Z-order curve (G. M. Morton, 1966)."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.geometry import Grid
from dit_accel.order.registry import ORDERS


@ORDERS.register("morton")
def morton(grid: Grid) -> Tensor:
    """Z-order: the bits of the three coordinates interleaved, on a grid of any size.

    An axis takes part with as many bits as it needs. On sizes other than powers of two the curve is that of the next
    power of two without the positions outside.
    """
    code = torch.zeros(grid, dtype=torch.int64)
    place = 0
    for bit in range(max((size - 1).bit_length() for size in grid)):
        for axis in (2, 1, 0):
            if (grid[axis] - 1) >> bit == 0:
                continue
            shape = [1, 1, 1]
            shape[axis] = grid[axis]
            coordinate = torch.arange(grid[axis]).view(shape)
            code += ((coordinate >> bit) & 1) << place
            place += 1
    return torch.argsort(code.reshape(-1))
