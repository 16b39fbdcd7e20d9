"""Choosing layers, heads, steps and tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dit_accel.geometry import TokenGeometry

__all__ = ["evenly", "lattice", "pick", "pick_tokens"]


def evenly(count: int, most: int) -> tuple[int, ...]:
    """Up to ``most`` of ``count`` indices, evenly spread, first and last included."""
    return tuple(dict.fromkeys(round(float(i)) for i in np.linspace(0, count - 1, min(most, count))))


def pick(name: str, asked: Sequence[int] | None, count: int, most: int) -> tuple[int, ...]:
    """Indices that were asked for, negative ones counted from the end, or ``most`` evenly spread ones.

    Raises:
        ValueError: none, or one that does not exist.
    """
    if asked is None:
        return evenly(count, most)
    bad = [i for i in asked if isinstance(i, bool) or not isinstance(i, int) or not -count <= i < count]
    if bad or not asked:
        raise ValueError(f"{name} must be indices from {-count} to {count - 1}, at least one, got {list(asked)}")
    return tuple(sorted({i % count for i in asked}))


def lattice(geometry: TokenGeometry, count: int) -> tuple[int, ...]:
    """Up to ``count`` visual tokens on a regular lattice over frames, rows and columns, in natural order."""
    sizes = np.asarray(geometry.axes)
    parts = np.ones(3, int)
    while True:  # split the axis whose cells are the longest, as long as the budget allows
        gaps = np.where(parts < sizes, sizes / parts, 0.0)
        for axis in np.argsort(-gaps, kind="stable"):
            more = parts.copy()
            more[axis] += 1
            if gaps[axis] > 0 and int(more.prod()) <= count:
                parts = more
                break
        else:
            break
    axes = [((np.arange(n) + 0.5) * size / n).astype(int) for n, size in zip(parts, sizes)]
    frame, row, column = np.meshgrid(*axes, indexing="ij")
    _, height, width = geometry.axes
    tokens = geometry.prefix + (frame * height + row) * width + column
    return tuple(int(t) for t in tokens.ravel())


def pick_tokens(asked: int | Sequence[int], geometry: TokenGeometry) -> tuple[int, ...]:
    """Query tokens in natural order: a lattice of so many, or those asked for.

    Raises:
        ValueError: no token, or one that does not exist.
    """
    if isinstance(asked, int):
        if asked < 1:
            raise ValueError(f"tokens must be at least 1 or a list of tokens, got {asked}")
        return lattice(geometry, asked)
    return pick("tokens", asked, geometry.tokens, 1)
