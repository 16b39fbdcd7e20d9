"""Neighbourhood windows: which keys a query sees by its position on the grid alone. See :mod:`.rule`."""

from __future__ import annotations

from dit_accel.windows.fit import (
    dilated_by_share,
    exact_strides,
    is_exact,
    snap,
    visible_fraction,
    window_for_density,
    windows_by_share,
)
from dit_accel.windows.intervals import AxisInterval, interval_windows
from dit_accel.windows.levels import LEVEL_FULL, LEVEL_NONE, LEVEL_PARTIAL, interval_levels, window_levels
from dit_accel.windows.rule import AxisWindow, WindowSpec, axis_codes
from dit_accel.windows.tokens import token_windows

__all__ = [
    "LEVEL_FULL",
    "LEVEL_NONE",
    "LEVEL_PARTIAL",
    "AxisInterval",
    "AxisWindow",
    "WindowSpec",
    "axis_codes",
    "dilated_by_share",
    "exact_strides",
    "interval_levels",
    "interval_windows",
    "is_exact",
    "snap",
    "token_windows",
    "visible_fraction",
    "window_for_density",
    "window_levels",
    "windows_by_share",
]
