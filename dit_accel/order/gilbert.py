"""The generalised Hilbert curve: a Hilbert-like path through boxes of any size.

The construction is that of J. Cerveny's "gilbert" curve. A box has a direction of travel ``a`` and two sides ``b``, ``c``;
its path starts at the corner where the three meet and ends at the other end of ``a``. A box is cut into smaller boxes of
the same kind whose end points touch:

* much longer than wide: two boxes behind each other;
* otherwise, with one thick side: up along it, across, and down again (three boxes);
* otherwise: both sides are halved, and five boxes visit the quarters.

Halves are made even where possible, since a path by single steps to the far side of a box needs the right parities.
Consecutive tokens are neighbours on the grid when all sizes are even; otherwise a few steps are diagonal (none or one in an
image, about 1 % in a video of odd sizes), never farther than one token along each axis.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.geometry import Grid
from dit_accel.order.registry import ORDERS

Axis = tuple[int, int, int]
"""Flat stride of one step, its length in tokens, and its direction (+1 or -1)."""


@ORDERS.register("gilbert")
def gilbert(grid: Grid) -> Tensor:
    """Generalised Hilbert curve: consecutive tokens are neighbours in a grid of any size."""
    frames, height, width = grid
    axes: list[Axis] = [(height * width, frames, 1), (width, height, 1), (1, width, 1)]
    # the curve travels along the longest axis; ties go to the innermost one
    axes.sort(key=lambda axis: (-axis[1], axis[0]))
    out: list[int] = []
    _path(0, axes[0], axes[1], axes[2], out)
    return torch.tensor(out, dtype=torch.int64)


def _path(start: int, a: Axis, b: Axis, c: Axis, out: list[int]) -> None:
    """Append the path through the box at ``start``; it ends ``len(a) - 1`` steps along ``a``."""
    if b[1] == 1 and c[1] == 1:
        step = a[0] * a[2]
        out.extend(start + i * step for i in range(a[1]))
    elif b[1] == 1 or c[1] == 1:
        _plane(start, a, c if b[1] == 1 else b, b if b[1] == 1 else c, out)
    else:
        _solid(start, a, b, c, out)


def _plane(start: int, a: Axis, b: Axis, thin: Axis, out: list[int]) -> None:
    if a[1] == 1:
        step = b[0] * b[2]
        out.extend(start + i * step for i in range(b[1]))
        return
    if 2 * a[1] > 3 * b[1]:
        near = _half(a, even=a[1] > 2)
        _path(start, _cut(a, near), b, thin, out)
        _path(start + _along(a, near), _cut(a, a[1] - near), b, thin, out)
        return
    up, near = _half(b, even=b[1] > 2), a[1] // 2
    _path(start, _cut(b, up), _cut(a, near), thin, out)
    _path(start + _along(b, up), a, _cut(b, b[1] - up), thin, out)
    corner = start + _along(a, a[1] - 1) + _along(b, up - 1)
    _path(corner, _back(_cut(b, up)), _back(_cut(a, a[1] - near)), thin, out)


def _solid(start: int, a: Axis, b: Axis, c: Axis, out: list[int]) -> None:
    if a[1] == 1:
        _plane(start, b, c, a, out)
        return
    near = _half(a, even=a[1] > 2)
    b_up, c_up = _half(b, even=b[1] > 2), _half(c, even=c[1] > 2)
    end = start + _along(a, a[1] - 1)
    if 2 * a[1] > 3 * b[1] and 2 * a[1] > 3 * c[1]:
        _path(start, _cut(a, near), b, c, out)
        _path(start + _along(a, near), _cut(a, a[1] - near), b, c, out)
    elif 3 * b[1] > 4 * c[1]:
        _path(start, _cut(b, b_up), c, _cut(a, near), out)
        _path(start + _along(b, b_up), a, _cut(b, b[1] - b_up), c, out)
        _path(end + _along(b, b_up - 1), _back(_cut(b, b_up)), c, _back(_cut(a, a[1] - near)), out)
    elif 3 * c[1] > 4 * b[1]:
        _path(start, _cut(c, c_up), _cut(a, near), b, out)
        _path(start + _along(c, c_up), a, b, _cut(c, c[1] - c_up), out)
        _path(end + _along(c, c_up - 1), _back(_cut(c, c_up)), _back(_cut(a, a[1] - near)), b, out)
    else:
        _five(start, a, b, c, (near, b_up, c_up), out)


def _five(start: int, a: Axis, b: Axis, c: Axis, cuts: Grid, out: list[int]) -> None:
    """Quarter by quarter around the box: up ``b``, along ``c``, across ``a``, back along ``c``, down ``b``."""
    near, b_up, c_up = cuts
    b_rest, c_rest, a_rest = _cut(b, b[1] - b_up), _cut(c, c[1] - c_up), _cut(a, a[1] - near)
    below, end = _along(b, b_up - 1), start + _along(a, a[1] - 1)
    top = _along(b, b_up)
    back = _along(c, c[1] - 1)
    _path(start, _cut(b, b_up), _cut(c, c_up), _cut(a, near), out)
    _path(start + top, c, _cut(a, near), b_rest, out)
    _path(start + below + back, a, _back(_cut(b, b_up)), _back(c_rest), out)
    _path(end + top + back, _back(c), _back(a_rest), b_rest, out)
    _path(end + below, _back(_cut(b, b_up)), _cut(c, c_up), _back(a_rest), out)


def _half(axis: Axis, *, even: bool) -> int:
    half = axis[1] // 2
    return half + 1 if even and half % 2 else half


def _cut(axis: Axis, length: int) -> Axis:
    return (axis[0], length, axis[2])


def _back(axis: Axis) -> Axis:
    return (axis[0], axis[1], -axis[2])


def _along(axis: Axis, steps: int) -> int:
    return axis[0] * axis[2] * steps
