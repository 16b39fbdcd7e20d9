"""Neighbourhood windows: which keys a query sees by its position on the grid alone. See :mod:`.rule`."""

from __future__ import annotations

from dit_accel.windows.fit import snap, visible_fraction, window_for_density, windows_by_share
from dit_accel.windows.levels import LEVEL_FULL, LEVEL_NONE, LEVEL_PARTIAL, window_levels
from dit_accel.windows.rule import AxisWindow, WindowSpec, axis_codes
from dit_accel.windows.tokens import token_windows

__all__ = [
    "LEVEL_FULL",
    "LEVEL_NONE",
    "LEVEL_PARTIAL",
    "AxisWindow",
    "WindowSpec",
    "axis_codes",
    "snap",
    "token_windows",
    "visible_fraction",
    "window_for_density",
    "window_levels",
    "windows_by_share",
]
