"""One interval test per axis: the common form of all windows that are a product over the axes.

On an axis a key at coordinate ``j`` has a code, and a query at coordinate ``i`` sees the codes ``lo <= code < hi``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.geometry import TokenGeometry
from dit_accel_kernels.types import TokenWindows

__all__ = ["AxisInterval", "check_index", "coordinates", "interval_windows"]

_FAR = 1 << 30


@dataclass(frozen=True, eq=False)
class AxisInterval:
    """Codes of one axis and what each coordinate sees, int64 ``[length]`` each.

    Attributes:
        code: code of each coordinate as a key, unique and at least 0.
        lo: first code that each coordinate sees as a query.
        hi: the code behind the last one.
    """

    code: Tensor
    lo: Tensor
    hi: Tensor


def interval_windows(geometry: TokenGeometry, axes: Sequence[AxisInterval], index: Tensor | None) -> TokenWindows:
    """Windows of every token, for kernels. Extra (text, reference) tokens see everything and are seen by everybody.

    Args:
        geometry: layout of the sequence.
        axes: intervals along frames, height and width.
        index: int ``[S]``, natural token at each position of block order; ``None`` for natural order.

    Returns:
        Windows in block order, int32 ``[3, S]`` on the device of ``index``.

    Raises:
        ValueError: ``index`` does not fit the geometry.
    """
    check_index(geometry, index)
    tables = torch.stack([torch.stack((a.code, a.lo, a.hi))[:, place] for a, place in zip(axes, coordinates(geometry))])
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
