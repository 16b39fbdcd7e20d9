"""The registry of token orders."""

from __future__ import annotations

from torch import Tensor

from dit_accel._specs import Registry

__all__ = ["ORDERS"]

ORDERS: Registry[Tensor] = Registry("order")
"""Factories ``(grid, *values) -> int64 [F*H*W]``: position ``i`` of the order holds visual token ``result[i]``."""
