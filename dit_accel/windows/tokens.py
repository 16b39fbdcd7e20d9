"""Windows of every token, as kernels consult them in partial blocks."""

from __future__ import annotations

from torch import Tensor

from dit_accel.geometry import TokenGeometry
from dit_accel.windows.intervals import AxisInterval, interval_windows
from dit_accel.windows.rule import WindowSpec, axis_codes
from dit_accel_kernels.types import TokenWindows

__all__ = ["token_windows"]


def token_windows(geometry: TokenGeometry, spec: WindowSpec, index: Tensor | None = None) -> TokenWindows:
    """Windows of every token by NATTEN's rule; see :func:`interval_windows`.

    Raises:
        ValueError: the window does not fit the grid or ``index`` the geometry.
    """
    return interval_windows(geometry, [AxisInterval(*axis_codes(axis)) for axis in spec.resolve(geometry)], index)
