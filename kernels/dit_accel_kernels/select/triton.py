"""The best blocks of a group in Triton: the value at the border, eight bits at a time, then one comparison."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common import blocks, next_power_of_2
from .._launch import launch
from ..aot_spec import AotSpec

__all__ = ["AOT_SPECS", "keep_best_triton", "unkept_energy_triton"]

_SPAN = 1024  # entries of a row that are handled together
_ALONE = 65536  # entries of a group up to which one program counts them; more are counted by many, a launch a digit
_PART = 4096  # entries that one of these looks at together
_PARTS = 2048  # at least as many as there are of these in a group: at most half as many again as 1024


@triton.jit
def _cleaned(X, COLS, at, inside, width, HAS_COLS: tl.constexpr):
    """Scores, 0 where they are not finite, infinite in forced columns."""
    b_x = tl.load(X + at, mask=inside, other=0.0)
    b_x = tl.where(tl.abs(b_x) < float("inf"), b_x, 0.0)
    b_x = tl.where(b_x == 0.0, 0.0, b_x)  # -0 is 0
    if HAS_COLS:
        forced = tl.load(COLS + (at % width).to(tl.int32), mask=inside, other=0) != 0
        b_x = tl.where(forced, float("inf"), b_x)
    return b_x


@triton.jit
def _ranked(b_x):
    """Integers in the order of the numbers; the map is its own inverse but for the type."""
    bits = b_x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _value(rank):
    bits = tl.where(rank < 0, rank ^ 0x7FFFFFFF, rank)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _histogram(
    X, COLS, base, first, last, width, rank,
    DIGIT: tl.constexpr, CHUNK: tl.constexpr, HAS_COLS: tl.constexpr,
):  # fmt: skip
    """How often each value of a digit of eight bits occurs among scores whose digits before it are those of ``rank``."""
    bins = tl.arange(0, 256)
    histogram = tl.zeros([256], tl.int32)
    missed = 0
    for start in range(first, last, CHUNK):
        at = start + tl.arange(0, CHUNK)
        hit = at < last
        here = _ranked(_cleaned(X, COLS, base + at, hit, width, HAS_COLS)) >> (24 - 8 * DIGIT)
        if DIGIT > 0:
            hit = hit & ((here >> 8) == rank)
            here = here & 255
        else:
            here += 128
        # What does not count goes to the first bin and is taken off again.
        histogram += tl.histogram(tl.where(hit, here, 0), 256)
        missed += CHUNK - tl.sum(hit.to(tl.int32), 0)
    return histogram - tl.where(bins == 0, missed, 0)


@triton.jit
def _next_digit(histogram, rank, left, FIRST: tl.constexpr):
    """Append the digit at which ``left`` are reached from above; how many are left then, and how many share the digit."""
    bins = tl.arange(0, 256)
    from_here_up = tl.cumsum(histogram, 0, reverse=True)
    found = tl.sum((from_here_up >= left).to(tl.int32), 0) - 1
    equal = tl.sum(tl.where(bins == found, histogram, 0), 0)
    left -= tl.sum(tl.where(bins == found, from_here_up, 0), 0) - equal
    if FIRST:
        rank = found - 128
    else:
        rank = rank * 256 + found
    return rank, left, equal


# Counts are not specialised: another number of blocks must not compile another kernel.
@triton.jit(do_not_specialize=["size", "count", "width", "share"])
def histogram_kernel(
    X, COLS, HISTOGRAMS, size, count, width, share, DIGIT: tl.constexpr, CHUNK: tl.constexpr, HAS_COLS: tl.constexpr
):
    """One program: ``share`` entries of one group, for the digit that follows those whose histograms are complete."""
    i_group = tl.program_id(1).to(tl.int64)
    bins = tl.arange(0, 256)
    HISTOGRAMS += i_group * 1024
    rank, left = 0, count
    for digit in tl.static_range(DIGIT):
        rank, left, _ = _next_digit(tl.load(HISTOGRAMS + digit * 256 + bins), rank, left, digit == 0)
    first = tl.program_id(0) * share
    last = tl.minimum(first + share, size)
    found = _histogram(X, COLS, i_group * size, first, last, width, rank, DIGIT, CHUNK, HAS_COLS)
    tl.atomic_add(HISTOGRAMS + DIGIT * 256 + bins, found, mask=found > 0, sem="relaxed")


@triton.jit(do_not_specialize=["size", "count", "width", "share"])
def ties_kernel(X, COLS, HISTOGRAMS, TIES, size, count, width, share, CHUNK: tl.constexpr, HAS_COLS: tl.constexpr):
    """One program: how many of ``share`` entries equal the ``count``-th largest of their group, if not all of them fit."""
    i_group = tl.program_id(1).to(tl.int64)
    bins = tl.arange(0, 256)
    rank, left, equal = 0, count, 0
    for digit in tl.static_range(4):
        histogram = tl.load(HISTOGRAMS + i_group * 1024 + digit * 256 + bins)
        rank, left, equal = _next_digit(histogram, rank, left, digit == 0)
    if equal > left:
        first = tl.program_id(0) * share
        ties = 0
        for start in range(first, tl.minimum(first + share, size), CHUNK):
            at = start + tl.arange(0, CHUNK)
            hit = at < tl.minimum(first + share, size)
            b_x = _cleaned(X, COLS, i_group * size + at, hit, width, HAS_COLS)
            ties += tl.sum((hit & (_ranked(b_x) == rank)).to(tl.int32), 0)
        tl.store(TIES + i_group * tl.num_programs(0) + tl.program_id(0), ties)


@triton.jit(do_not_specialize=["size", "count", "width", "share"])
def border_kernel(
    X, COLS, HISTOGRAMS, TIES, BORDER, CUT, ENERGY, size, count, width, share,
    CHUNK: tl.constexpr, HAS_COLS: tl.constexpr, WANT_ENERGY: tl.constexpr, COUNTED: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One program: the ``count``-th largest of one group, and up to where those equal to it are kept.

    With COUNTED the histograms of all digits are there, and how many of each ``share`` entries are equal to it, of at most
    PARTS. With WANT_ENERGY it writes the sum of the squares of what is not kept instead.
    """
    i_group = tl.program_id(0).to(tl.int64)
    base = i_group * size
    bins = tl.arange(0, 256)
    rank, left, equal = 0, count, 0
    for digit in tl.static_range(4):
        if COUNTED:
            histogram = tl.load(HISTOGRAMS + i_group * 1024 + digit * 256 + bins)
        else:
            histogram = _histogram(X, COLS, base, 0, size, width, rank, digit, CHUNK, HAS_COLS)
        rank, left, equal = _next_digit(histogram, rank, left, digit == 0)
    if WANT_ENERGY:
        border = _value(rank)
        energy = (equal - left).to(tl.float32) * border * border
        for start in range(0, size, CHUNK):
            at = start + tl.arange(0, CHUNK)
            b_x = _cleaned(X, COLS, base + at, at < size, width, HAS_COLS)
            energy += tl.sum(tl.where((at < size) & (_ranked(b_x) < rank), b_x * b_x, 0.0), 0)
        tl.store(ENERGY + i_group, energy)
    else:
        cut = size
        if equal > left:
            cut = 0
            seen = 0
            first = 0
            last = size
            if COUNTED:
                part = tl.arange(0, PARTS)
                parts = (size + share - 1) // share
                b_ties = tl.load(TIES + i_group * parts + part, mask=part < parts, other=0)
                before = tl.cumsum(b_ties, 0) < left
                seen = tl.sum(tl.where(before, b_ties, 0), 0)
                first = tl.sum((before & (part < parts)).to(tl.int32), 0) * share
                last = tl.minimum(first + share, size)
            for start in range(first, last, CHUNK):
                at = start + tl.arange(0, CHUNK)
                b_x = _cleaned(X, COLS, base + at, at < last, width, HAS_COLS)
                same = ((at < last) & (_ranked(b_x) == rank)).to(tl.int32)
                place = seen + tl.cumsum(same, 0)
                cut = tl.maximum(cut, tl.max(tl.where((same != 0) & (place <= left), at + 1, 0), 0))
                seen += tl.sum(same, 0)
        tl.store(BORDER + i_group, rank)
        tl.store(CUT + i_group, cut)


@triton.jit(do_not_specialize=["height", "width"])
def keep_kernel(
    X, ROWS, COLS, BORDER, CUT, OUT, height, width,
    SPAN: tl.constexpr, BY_HEAD: tl.constexpr, HAS_ROWS: tl.constexpr, HAS_COLS: tl.constexpr,
):  # fmt: skip
    """One program: one row of the map."""
    i_row = tl.program_id(0).to(tl.int64)
    base = i_row * width
    top, best = float("-inf"), 0
    for start in range(0, width, SPAN):
        col = start + tl.arange(0, SPAN)
        b_x = _cleaned(X, COLS, base + col, col < width, width, HAS_COLS)
        b_x = tl.where(col < width, b_x, float("-inf"))
        here = tl.max(b_x, 0)
        first = tl.min(tl.where(b_x == here, col, width), 0)
        best = tl.where(here > top, first, best)
        top = tl.maximum(top, here)
    group, before = i_row, tl.cast(0, tl.int64)
    if BY_HEAD:
        group = i_row // height
        before = (i_row - group * height) * width
    border, cut = tl.load(BORDER + group), tl.load(CUT + group)
    whole = False
    if HAS_ROWS:
        whole = tl.load(ROWS + i_row % height) != 0
    for start in range(0, width, SPAN):
        col = start + tl.arange(0, SPAN)
        inside = col < width
        b_x = _cleaned(X, COLS, base + col, inside, width, HAS_COLS)
        rank = _ranked(b_x)
        keep = (rank > border) | ((rank == border) & (before + col < cut)) | (col == best) | whole
        if HAS_COLS:
            keep = keep | (tl.load(COLS + col, mask=inside, other=0) != 0)
        tl.store(OUT + base + col, keep.to(tl.uint8), mask=inside)


def _chunk(size: int) -> tuple[int, int]:
    """Entries that a program looks at together, and its warps: small groups are many, and programs of them small."""
    return (512, 2) if size <= 2048 else (8192, 16)


def _flags(flags: Tensor | None, other: Tensor) -> Tensor:
    return other if flags is None else flags.contiguous().view(torch.uint8)


def keep_best_triton(scores: Tensor, count: int, by_head: bool, rows: Tensor | None, cols: Tensor | None) -> Tensor:
    """See :func:`dit_accel_kernels.select.keep_best`; contiguous scores."""
    batch, heads, height, width = scores.shape
    size = height * width if by_head else width
    groups = batch * heads * (1 if by_head else height)
    border = torch.empty(2, groups, dtype=torch.int32, device=scores.device)
    many = size > _ALONE
    share = _PART * max(2, size * groups // (_PART * 1024))
    parts = blocks(size, share)
    ties = border.new_empty(groups, parts) if many else border
    histograms = torch.zeros(groups, 4, 256, dtype=torch.int32, device=scores.device) if many else border
    out = torch.empty_like(scores, dtype=torch.uint8)
    row_flags, col_flags = _flags(rows, scores), _flags(cols, scores)
    chunk, warps = _chunk(size)
    with torch.cuda.device_of(scores):
        if many:
            for digit in range(4):
                launch(histogram_kernel, (parts, groups))(
                    scores, col_flags, histograms, size, count, width, share,
                    DIGIT=digit, CHUNK=_PART, HAS_COLS=cols is not None, num_warps=8,
                )  # fmt: skip
            launch(ties_kernel, (parts, groups))(
                scores, col_flags, histograms, ties, size, count, width, share,
                CHUNK=_PART, HAS_COLS=cols is not None, num_warps=8,
            )  # fmt: skip
        launch(border_kernel, (groups,))(
            scores, col_flags, histograms, ties, border[0], border[1], scores, size, count, width, share,
            CHUNK=chunk, HAS_COLS=cols is not None, WANT_ENERGY=False, COUNTED=many, PARTS=_PARTS, num_warps=warps,
        )  # fmt: skip
        launch(keep_kernel, (batch * heads * height,))(
            scores, row_flags, col_flags, border[0], border[1], out, height, width,
            SPAN=min(next_power_of_2(width), _SPAN), BY_HEAD=by_head, HAS_ROWS=rows is not None,
            HAS_COLS=cols is not None, num_warps=4,
        )  # fmt: skip
    return out


def unkept_energy_triton(scores: Tensor, count: int) -> Tensor:
    """See :func:`dit_accel_kernels.select.unkept_energy`; contiguous scores."""
    size, energy = scores.shape[-1], scores.new_empty(scores.shape[:-1])
    chunk, warps = _chunk(size)
    with torch.cuda.device_of(scores):
        launch(border_kernel, (energy.numel(),))(
            scores, scores, energy, energy, energy, energy, energy, size, count, size, size,
            CHUNK=chunk, HAS_COLS=False, WANT_ENERGY=True, COUNTED=False, PARTS=_PARTS, num_warps=warps,
        )  # fmt: skip
    return energy


def _spec(fn: object, name: str, constants: dict[str, int], warps: int) -> AotSpec:
    types = {"X": "*fp32", "ENERGY": "*fp32", "OUT": "*u8", "ROWS": "*u8", "COLS": "*u8"}
    types |= dict.fromkeys(("BORDER", "CUT", "HISTOGRAMS", "TIES"), "*i32")
    names = fn.arg_names  # type: ignore[attr-defined]
    return AotSpec(
        name=name,
        fn=fn,
        signature={n: "constexpr" if n in constants else types.get(n, "i32") for n in names},
        constexprs=constants,
        options={"num_warps": warps},
        max_spill_bytes=16,
        divisible_by_16=("X",),
    )


_ALL = {"HAS_COLS": True, "WANT_ENERGY": False, "COUNTED": False, "PARTS": _PARTS}
AOT_SPECS = [
    _spec(border_kernel, "border/8192", {"CHUNK": 8192, **_ALL}, 16),
    _spec(border_kernel, "border/8192/counted", {"CHUNK": 8192, **_ALL, "COUNTED": True}, 16),
    _spec(border_kernel, "border/512/energy", {"CHUNK": 512, **_ALL, "WANT_ENERGY": True}, 2),
    _spec(histogram_kernel, "histogram/4096/first", {"DIGIT": 0, "CHUNK": 4096, "HAS_COLS": False}, 8),
    _spec(histogram_kernel, "histogram/4096/last", {"DIGIT": 3, "CHUNK": 4096, "HAS_COLS": True}, 8),
    _spec(ties_kernel, "ties/4096", {"CHUNK": 4096, "HAS_COLS": True}, 8),
    _spec(keep_kernel, "keep/1024", {"SPAN": 1024, "BY_HEAD": True, "HAS_ROWS": True, "HAS_COLS": True}, 4),
]
