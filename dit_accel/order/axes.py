"""The six permutations of the axes.

PAROAttention (arXiv 2506.16054) picks one per head: with the attended axis innermost, a multi-diagonal attention map
becomes block-diagonal. The name lists the axes from the outermost to the innermost, so ``"hwf"`` runs through all frames
of one position before it moves on. :data:`AXIS_ORDERS` has PARO's numbering: 0 FHW (natural), 1 FWH, 2 HWF, 3 HFW, 4 WHF,
5 WFH.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dit_accel.geometry import Grid
from dit_accel.order.registry import ORDERS

__all__ = ["AXIS_ORDERS"]

AXIS_ORDERS = ("fhw", "fwh", "hwf", "hfw", "whf", "wfh")


def _axis_order(name: str) -> Callable[[Grid], Tensor]:
    axes = tuple("fhw".index(letter) for letter in name)

    def order(grid: Grid) -> Tensor:
        frames, height, width = grid
        natural = torch.arange(frames * height * width).view(frames, height, width)
        return natural.permute(axes).reshape(-1)

    order.__doc__ = f"Axes {', '.join(name.upper())} from the outermost to the innermost."
    return order


for _name in AXIS_ORDERS:
    ORDERS.register(_name, paper="arXiv 2506.16054")(_axis_order(_name))
