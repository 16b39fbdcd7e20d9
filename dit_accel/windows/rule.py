"""Neighbourhood windows on the token grid: which keys a query sees by position alone.

The rule is NATTEN's (arXiv 2204.07143, dilation 2209.15001, stride and causality 2504.16922). On an axis of length ``L``
query ``i`` sees exactly ``window`` keys around itself; at the borders the window is shifted inwards, never cut. With a
stride all queries of a group of ``stride`` share the window of the group's middle. With a dilation the axis falls apart
into ``dilation`` interleaved axes, on each of which the rule holds. On a causal axis a query sees itself and what is
before it, at most back to the window of its group's last member. On several axes all conditions hold at once.

Everything here is one interval test per axis: coordinates are replaced by codes in which the tokens of one dilation residue
are consecutive, so a key is visible iff ``lo <= code < hi``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dit_accel.geometry import TokenGeometry

__all__ = ["AxisWindow", "WindowSpec", "axis_codes"]

Window = int | Literal["full"]
FULL = -1
_AXES = ("frames", "height", "width")


@dataclass(frozen=True)
class AxisWindow:
    """The rule on one axis, all in tokens: ``1 <= stride <= window <= length``, ``window * dilation <= length``."""

    length: int
    window: int
    stride: int = 1
    dilation: int = 1
    causal: bool = False


@dataclass(frozen=True)
class WindowSpec:
    """A neighbourhood window, for any grid.

    Each field is one value for all axes or a tuple of one to three for the *last* axes of ``(F, H, W)``; axes without a
    value are full. So ``WindowSpec((24, 24))`` sees all frames.

    A window at least as long as its axis, ``-1`` and ``"full"`` all mean the whole axis; stride and dilation have no
    meaning there. A *scalar* dilation is lowered
    on axes too short for it. Whatever else breaks NATTEN's rules raises. Beyond NATTEN, a window of 1 is allowed.

    Attributes:
        window: keys seen on an axis.
        stride: queries that share one window.
        dilation: distance of neighbouring keys.
        causal: whether only keys at or before the query count; a non-tuple ``True`` concerns all axes.

    Raises:
        ValueError: a value is out of its range or tuples differ in length.
    """

    window: Window | tuple[Window, ...]
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    causal: bool | tuple[bool, ...] = False

    def __post_init__(self) -> None:
        values = (self.window, self.stride, self.dilation, self.causal)
        lengths = {len(value) for value in values if isinstance(value, tuple)}
        if len(lengths) > 1 or not lengths <= {1, 2, 3}:
            raise ValueError(
                f"window, stride, dilation and causal must be scalars or tuples of one length from 1 to 3, got {self}"
            )
        for window in _tuple(self.window):
            if window != "full" and (not _is_int(window) or (window < 1 and window != FULL)):
                raise ValueError(f"window must be at least 1 token, -1 or 'full', got {window!r} in {self}")
        for name in ("stride", "dilation"):
            for value in _tuple(getattr(self, name)):
                if not _is_int(value) or value < 1:
                    raise ValueError(f"{name} must be an integer of at least 1, got {value!r} in {self}")
        if not all(isinstance(value, bool) for value in _tuple(self.causal)):
            raise ValueError(f"causal must be a bool or a tuple of them, got {self.causal!r}")
        count = max(lengths, default=1)
        for window, stride in zip(_spread(self.window, count), _spread(self.stride, count)):
            if window not in (FULL, "full") and int(stride) > int(window):
                raise ValueError(f"stride must be at most the window, {window}, got {stride} in {self}")

    def resolve(self, geometry: TokenGeometry) -> tuple[AxisWindow, AxisWindow, AxisWindow]:
        """The rule on each axis of ``geometry``; a geometry without a grid has one axis.

        Raises:
            ValueError: a dilated window, given for this axis, is longer than the axis.
        """
        values = (self.window, self.stride, self.dilation, self.causal)
        given = max((len(value) for value in values if isinstance(value, tuple)), default=3)
        blank = 3 - given
        windows: tuple[Window, ...] = (FULL,) * blank + _spread(self.window, given)
        strides = (1,) * blank + _spread(self.stride, given)
        dilations = (1,) * blank + _spread(self.dilation, given)
        causals = (False,) * blank + _spread(self.causal, given)
        explicit = isinstance(self.dilation, tuple)
        parts = zip(_AXES, geometry.axes, windows, strides, dilations, causals)
        first, second, third = (
            _resolve_axis(name, AxisWindow(length, length, stride, dilation, causal), window, explicit)
            for name, length, window, stride, dilation, causal in parts
        )
        return first, second, third


def _resolve_axis(name: str, wanted: AxisWindow, window: Window, explicit: bool) -> AxisWindow:
    length, dilation = wanted.length, wanted.dilation
    if window == "full" or window == FULL or window >= length:
        return AxisWindow(length, length, causal=wanted.causal)
    if window * dilation > length:
        if explicit:
            raise ValueError(
                f"window * dilation must be at most {length}, the {name} of the grid, got {window} * {dilation}"
            )
        dilation = length // window
    return AxisWindow(length, window, wanted.stride, dilation, wanted.causal)


def axis_codes(axis: AxisWindow) -> tuple[Tensor, Tensor, Tensor]:
    """Code of each coordinate as a key, and the codes ``[lo, hi)`` that it sees as a query; int64 ``[length]`` each.

    Codes are unique and below ``dilation * ceil(length / dilation)``; without dilation they are the coordinates.
    """
    coordinate = torch.arange(axis.length)
    residue, index = coordinate % axis.dilation, coordinate // axis.dilation
    group = axis.length // axis.dilation + (residue < axis.length % axis.dilation).long()
    base = residue * -(-axis.length // axis.dilation)
    before = axis.window // 2
    after = axis.window - before - 1
    leader = index // axis.stride * axis.stride
    if axis.causal:
        leader = torch.minimum(leader + axis.stride - 1, group - 1)
        lo, hi = (leader - axis.window + 1).clamp(min=0), index + 1
    else:
        leader = torch.minimum(leader + axis.stride // 2, group - 1)
        centre = torch.minimum(leader.clamp(min=before), group - 1 - after)
        lo, hi = centre - before, centre + after + 1
    return base + index, base + lo, base + hi


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _tuple(value: object) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _spread(value: object, count: int) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,) * count
