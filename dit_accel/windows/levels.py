"""Which block pairs a window empties, fills, or splits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dit_accel.geometry import TokenGeometry
from dit_accel.windows.intervals import AxisInterval, check_index, coordinates
from dit_accel.windows.rule import WindowSpec, axis_codes

__all__ = ["LEVEL_FULL", "LEVEL_NONE", "LEVEL_PARTIAL", "interval_levels", "window_levels"]

LEVEL_NONE, LEVEL_FULL, LEVEL_PARTIAL = 0, 1, 255
_CHUNK = 1 << 21  # elements of a temporary


def window_levels(
    geometry: TokenGeometry,
    spec: WindowSpec,
    index: Tensor | None,
    block_q: int,
    block_k: int,
) -> Tensor:
    """What a neighbourhood window leaves of each block pair, exactly; see :func:`interval_levels`."""
    axes = [AxisInterval(*axis_codes(axis)) for axis in spec.resolve(geometry)]
    return interval_levels(geometry, axes, index, block_q, block_k)


def interval_levels(
    geometry: TokenGeometry,
    intervals: Sequence[AxisInterval],
    index: Tensor | None,
    block_q: int,
    block_k: int,
) -> Tensor:
    """What intervals on the axes leave of each block pair, exactly.

    For each key block the number of its keys that a query sees is a separable sum over the grid: one running sum and one
    difference per axis give it for all distinct windows at once. No ``[S, S]`` tensor is made.

    Args:
        geometry: layout of the sequence.
        intervals: what coordinates see along frames, height and width.
        index: int ``[S]``, natural token at each position of block order; ``None`` for natural order.
        block_q: queries in a block.
        block_k: keys in a block.

    Returns:
        uint8 ``[1, 1, ceil(S / block_q), ceil(S / block_k)]`` on the CPU: 0 where no query sees a key, 1 where all see all,
        255 otherwise.
    """
    check_index(geometry, index)
    if block_q < 1 or block_k < 1:
        raise ValueError(f"block_q and block_k must be at least 1 token, got {block_q} and {block_k}")
    order = torch.arange(geometry.tokens) if index is None else index.detach().cpu().long()
    visual = order - geometry.prefix
    visual[(visual < 0) | (visual >= geometry.visual)] = -1
    axes = [_AxisCounts(axis) for axis in intervals]
    boxes, box_of_token = _distinct_boxes(geometry, axes)
    queries, keys = _blocks(visual, block_q), _blocks(visual, block_k)
    real_keys = (keys >= 0).sum(1)
    rows = _boxes_of_blocks(queries, box_of_token, boxes)
    levels = torch.empty(len(queries), len(keys), dtype=torch.uint8)
    codes = [axis.code[coordinate] for axis, coordinate in zip(axes, coordinates(geometry))]
    chunk = max(1, min(len(keys), _CHUNK // max(geometry.visual, rows.numel())))
    for start in range(0, len(keys), chunk):
        part = keys[start : start + chunk]
        counts = _keys_in_boxes(part, codes, axes)  # [boxes, chunk]
        some = counts.new_zeros(len(rows), len(part))
        least = counts.new_full(some.shape, block_k)
        for column in rows.T:
            picked = counts[column]
            torch.maximum(some, picked, out=some)
            torch.minimum(least, picked, out=least)
        level = torch.full(some.shape, LEVEL_PARTIAL, dtype=torch.uint8)
        level[some == 0] = LEVEL_NONE
        level[least >= real_keys[start : start + chunk]] = LEVEL_FULL
        levels[:, start : start + chunk] = level
    return _with_extra_tokens(levels, geometry, order, block_q, block_k)[None, None]


class _AxisCounts:
    """Codes of one axis and its distinct query intervals."""

    def __init__(self, axis: AxisInterval) -> None:
        self.code = axis.code
        intervals, self.interval_of = torch.unique(torch.stack((axis.lo, axis.hi)), dim=1, return_inverse=True)
        self.lo, self.hi = intervals[0], intervals[1]


def _distinct_boxes(geometry: TokenGeometry, axes: list[_AxisCounts]) -> tuple[int, Tensor]:
    """Number of distinct windows and, for each visual token, the number of its own."""
    box = torch.zeros(geometry.visual, dtype=torch.int64)
    for axis, coordinate in zip(axes, coordinates(geometry)):
        box = box * len(axis.lo) + axis.interval_of[coordinate]
    return math.prod(len(axis.lo) for axis in axes), box


def _blocks(visual: Tensor, block: int) -> Tensor:
    """Visual tokens of each block, ``[blocks, block]``; -1 for extra tokens and padding."""
    padded = visual.new_full((-(-len(visual) // block) * block,), -1)
    padded[: len(visual)] = visual
    return padded.view(-1, block)


def _boxes_of_blocks(queries: Tensor, box_of_token: Tensor, boxes: int) -> Tensor:
    """Distinct windows of each query block ``[Qb, M]``, padded with repeats (any window if all its tokens are extra)."""
    box = torch.where(queries >= 0, box_of_token[queries.clamp(min=0)], boxes).sort(1).values
    new = torch.ones_like(box, dtype=torch.bool)
    new[:, 1:] = box[:, 1:] != box[:, :-1]
    new &= box < boxes
    count = new.sum(1)
    most = max(int(count.max()), 1)
    rows = box.masked_fill(~new, boxes).sort(1).values[:, :most]
    filler = torch.where(count > 0, rows[:, 0], 0)[:, None]
    return torch.where(rows < boxes, rows, filler)


def _keys_in_boxes(keys: Tensor, codes: list[Tensor], axes: list[_AxisCounts]) -> Tensor:
    """Keys of each block inside each distinct window: int16 or int32 ``[boxes, blocks]``.

    The running sums cover only the part of the grid that these key blocks touch.
    """
    dtype = torch.int16 if keys.shape[1] < 1 << 15 else torch.int32
    block, slot = (keys >= 0).nonzero(as_tuple=True)
    if not len(block):
        return torch.zeros(math.prod(len(axis.lo) for axis in axes), len(keys), dtype=dtype)
    places = [code[keys[block, slot]] for code in codes]
    first = [int(place.min()) for place in places]
    size = [int(place.max()) - low + 1 for place, low in zip(places, first)]
    counts = torch.zeros(*size, len(keys), dtype=dtype)
    counts[(*(place - low for place, low in zip(places, first)), block)] = 1
    for dim in (2, 1, 0):
        counts = _interval_sums(counts, dim, axes[dim].lo - first[dim], axes[dim].hi - first[dim])
    return counts.reshape(-1, len(keys))


def _interval_sums(counts: Tensor, dim: int, lo: Tensor, hi: Tensor) -> Tensor:
    """Sums of ``counts`` along ``dim`` over the intervals ``[lo, hi)``."""
    size = counts.shape[dim]
    lo, hi = lo.clamp(0, size), hi.clamp(0, size)
    if bool((lo == 0).all() and (hi == size).all()):
        sums = counts.sum(dim, keepdim=True, dtype=counts.dtype)
        return sums.expand(*(len(lo) if d == dim else -1 for d in range(4)))
    nothing = torch.zeros_like(counts.narrow(dim, 0, 1))
    sums = torch.cat((nothing, counts.cumsum(dim, dtype=counts.dtype)), dim)
    return sums.index_select(dim, hi) - sums.index_select(dim, lo)


def _with_extra_tokens(levels: Tensor, geometry: TokenGeometry, order: Tensor, block_q: int, block_k: int) -> Tensor:
    """Account for tokens that see all and are seen by all."""
    extra = (order < geometry.prefix) | (order >= geometry.prefix + geometry.visual)
    any_q, all_q = _any_all(extra, block_q)
    any_k, all_k = _any_all(extra, block_k)
    levels[(any_q[:, None] | any_k) & (levels == LEVEL_NONE)] = LEVEL_PARTIAL
    levels[all_q[:, None] | all_k] = LEVEL_FULL
    return levels


def _any_all(flags: Tensor, block: int) -> tuple[Tensor, Tensor]:
    count = torch.zeros(-(-len(flags) // block), dtype=torch.int64)
    size = count.clone()
    number = torch.arange(len(flags)) // block
    count.index_add_(0, number, flags.long())
    size.index_add_(0, number, torch.ones_like(number))
    return count > 0, count == size
