"""Windows of every token, as kernels consult them in partial blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.geometry import TokenGeometry
from dit_accel.windows.rule import WindowSpec, axis_codes
from dit_accel_kernels.types import TokenWindows

__all__ = ["check_index", "coordinates", "token_windows"]

_FAR = 1 << 30


def token_windows(geometry: TokenGeometry, spec: WindowSpec, index: Tensor | None = None) -> TokenWindows:
    """Windows of every token, for kernels.

    Extra (text, reference) tokens see everything and are seen by everybody.

    Args:
        geometry: layout of the sequence.
        spec: the window.
        index: int ``[S]``, natural token at each position of block order; ``None`` for natural order.

    Returns:
        Windows in block order, int32 ``[3, S]`` on the device of ``index``.

    Raises:
        ValueError: the window does not fit the grid or ``index`` the geometry.
    """
    check_index(geometry, index)
    axes = spec.resolve(geometry)
    parts = [axis_codes(axis) for axis in axes]
    tables = torch.stack([torch.stack(part, 0)[:, place] for part, place in zip(parts, coordinates(geometry))])
    full = torch.empty(3, 3, geometry.tokens, dtype=torch.int32)  # [axis, (code, lo, hi), S]
    full[:] = torch.tensor([-1, -_FAR, _FAR], dtype=torch.int32).view(1, 3, 1)
    full[:, :, geometry.visual_slice] = tables.to(torch.int32)
    if index is not None:
        full = full.to(index.device)[:, :, index.long()]
    code, lo, hi = (full[:, i].contiguous() for i in range(3))
    return TokenWindows(lo, hi, code)


def coordinates(geometry: TokenGeometry) -> tuple[Tensor, Tensor, Tensor]:
    """Frame, row and column of each visual token, int64 ``[visual]``."""
    _, height, width = geometry.axes
    token = torch.arange(geometry.visual)
    return token // (height * width), token // width % height, token % width


def check_index(geometry: TokenGeometry, index: Tensor | None) -> None:
    """Raise ``ValueError`` unless ``index`` is ``None`` or integers ``[S]`` for this geometry."""
    if index is None:
        return
    if index.dim() != 1 or index.is_floating_point() or len(index) != geometry.tokens:
        raise ValueError(
            f"index must be integers [{geometry.tokens}] for geometry {geometry}, "
            f"got {index.dtype} of shape {tuple(index.shape)}"
        )
