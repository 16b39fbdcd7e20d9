"""Lists of neighbouring query blocks of 64 as those of a pair: what both visit, and what only one of them does.

The kernel of :mod:`.hopper_pairs` multiplies two query blocks at once, one in each consumer, and fetches what both visit
once. What it needs is written down here in the order in which it is fetched, in units of 64 keys: *private* entries, which
one consumer takes alone, before *common* ones, which both rows have. The one block that can be ragged is always private and
comes first in its row. A row that is not empty has a private entry, so that the first tile of a row, which is the one with
a mask, is its own.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from ..aot_spec import AotSpec

__all__ = ["AOT_SPECS", "CHUNK", "FIELDS", "pair_lists_kernel"]

CHUNK = 128  # entries of a row that are looked at together
FIELDS = 8  # numbers that are told about a pair, of which five are used


@triton.jit
def _among(ids, begin, count, wanted):
    """Whether each of ``wanted`` is one of the ``count`` sorted ids from ``begin`` on: a search by halves."""
    low = tl.zeros_like(wanted)
    high = low + count
    left = count
    while left > 0:
        middle = (low + high) // 2
        inside = low < high
        less = tl.load(ids + (begin + middle), mask=inside, other=0) < wanted
        low = tl.where(inside & less, middle + 1, low)
        high = tl.where(inside & (less == 0), middle, high)
        left = left // 2
    return tl.load(ids + (begin + low), mask=low < count, other=-1) == wanted


@triton.jit
def _row(row_start, full, partial, row, there, HAS_PARTIAL: tl.constexpr):
    """Where a row begins, its whole and its partial entries; none if it is not ``there``."""
    begin = tl.load(row_start + row, mask=there, other=0)
    n_full = tl.load(full + row, mask=there, other=0)
    n_partial = n_full * 0
    if HAS_PARTIAL:
        n_partial = tl.load(partial + row, mask=there, other=0)
    return begin, n_full, n_partial


@triton.jit
def _entries(
    ids, o, n, begin, other, other_full, other_partial, last, one, two, HAS_PARTIAL: tl.constexpr
):  # fmt: skip
    """Entries ``o`` of a row, which of them the other row has as well, and which not; ``one`` and ``two`` are private."""
    entry = tl.load(ids + (begin + o), mask=o < n, other=-1)
    there = (o < n) & (entry != last)
    both = _among(ids, other, other_full, entry)
    if HAS_PARTIAL:
        both = both | _among(ids, other + other_full, other_partial, entry)
    both = both & there & (entry != one) & (entry != two)
    return entry, both.to(tl.int32), (there & (both == 0)).to(tl.int32)


@triton.jit
def _count(
    ids, n, begin, other, other_full, other_partial, last, HAS_PARTIAL: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """How many entries of a row the other one has as well, and the last two of these, -1 for none."""
    none = n * 0 - 1
    found, one, two = n * 0, none, none
    for start in range(0, n, CHUNK):
        o = start + tl.arange(0, CHUNK)
        entry, both, _ = _entries(ids, o, n, begin, other, other_full, other_partial, last, none, none, HAS_PARTIAL)
        rank = tl.cumsum(both, 0)
        total = tl.sum(both, 0)
        newest = tl.max(tl.where((both != 0) & (rank == total), entry, -1), 0)
        second = tl.max(tl.where((both != 0) & (rank == total - 1), entry, -1), 0)
        two = tl.where(total > 1, second, tl.where(total > 0, one, two))
        one = tl.where(total > 0, newest, one)
        found += total
    return found, one, two


@triton.jit
def _has(ids, n, begin, last, CHUNK: tl.constexpr):
    """Whether a row has the block ``last``: 1 or 0."""
    found = n * 0
    if last >= 0:
        for start in range(0, n, CHUNK):
            o = start + tl.arange(0, CHUNK)
            found += tl.sum((tl.load(ids + (begin + o), mask=o < n, other=-1) == last).to(tl.int32), 0)
    return found


@triton.jit
def _put(out, place, units, first, second, block, mask):
    """Write to the place of a pair, of which ``units`` are in the first row's and the others in the second one's."""
    at = tl.where(place < units, first + place, second + (place - units))
    tl.store(out + at, block.to(tl.int16), mask=mask)


@triton.jit
def _private(i, w, gap, first_gap, second_gap, turns, shared, PARTS: tl.constexpr):
    """The place of a row's private block number ``i`` among all of the pair; see :func:`pair_lists_kernel`."""
    tile = (i + gap) // PARTS
    x = tl.where(tile < turns, 2 * tile + w, turns + shared + tile)
    return PARTS * x + (i + gap) % PARTS - first_gap - tl.where(x >= 1, second_gap, 0)


@triton.jit
def _write(
    ids, out, n, begin, other, other_full, other_partial, last, one, two, has_last, size, kb,
    w, gap, first_gap, second_gap, turns, shared, units, first, second,
    R: tl.constexpr, PARTS: tl.constexpr, HAS_PARTIAL: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Write the private blocks of a row and, for the first row, what both have."""
    alone_before, both_before = n * 0, n * 0
    r_last = tl.arange(0, 2)
    ahead = _private(r_last, w, gap, first_gap, second_gap, turns, shared, PARTS)
    _put(out, ahead, units, first, second, kb - 1 - r_last, r_last < has_last * size)
    for start in range(0, n, CHUNK):
        o = start + tl.arange(0, CHUNK)
        entry, both, alone = _entries(
            ids, o, n, begin, other, other_full, other_partial, last, one, two, HAS_PARTIAL
        )  # fmt: skip
        private = alone_before + tl.cumsum(alone, 0) - alone
        common = both_before + tl.cumsum(both, 0) - both
        for r in tl.static_range(R):
            i = has_last * size + private * R + r
            place = _private(i, w, gap, first_gap, second_gap, turns, shared, PARTS)
            _put(out, place, units, first, second, entry * R + r, alone != 0)
            place = PARTS * 2 * turns + common * R + r - first_gap - second_gap
            _put(out, place, units, first, second, entry * R + r, (both != 0) & (w == 0))
        alone_before += tl.sum(alone, 0)
        both_before += tl.sum(both, 0)


@triton.jit(do_not_specialize=["qb", "pairs", "last", "kb"])
def pair_lists_kernel(
    row_start, full, partial, indices, merged, told, length, qb, pairs, last, kb,
    R: tl.constexpr, PARTS: tl.constexpr, HAS_PARTIAL: tl.constexpr, CHUNK: tl.constexpr, FIELDS: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """Write the blocks of one pair to ``merged`` in the order of its tiles, and what they are to ``told``.

    Tiles of ``PARTS`` blocks of 64 keys: private ones of the first and of the second row in turn, as long as both have any;
    common ones; what is left of the longer row. Of a row's private tiles the first has what does not fill a tile, which is
    nothing in a row without entries. Blocks are one behind the other in the place of the first row, then in that of the
    second.

    ``told``, ``[pairs, 8]``: where the first row begins, its blocks, where the second begins, its blocks, and how many they
    have in common. ``length`` is that of the longer one.

    Args:
        last: id of the ragged block in units of ``64 * R`` keys, -1 for none.
        kb: blocks of 64 keys.
        R: blocks of 64 keys in an entry, 1 or 2.
        PARTS: blocks of 64 keys in a tile, 1 or 2.
        PDL: let the next kernel start, which waits for the end of this one.
    """
    if PDL:
        gdc_launch_dependents()
    i = tl.program_id(0)
    i_pair = i % pairs
    row = i // pairs * qb + 2 * i_pair
    begin, n_full, n_partial = _row(row_start, full, partial, row, True, HAS_PARTIAL)
    other, other_full, other_partial = _row(
        row_start, full, partial, row + 1, 2 * i_pair + 1 < qb, HAS_PARTIAL
    )  # fmt: skip
    n, m = n_full + n_partial, other_full + other_partial
    found, one, two = _count(indices, n, begin, other, other_full, other_partial, last, HAS_PARTIAL, CHUNK)
    has_last, other_last = _has(indices, n, begin, last, CHUNK), _has(indices, m, other, last, CHUNK)
    # Neither row may be without a private entry: as many of the last common ones as must are private after all.
    common = tl.maximum(tl.minimum(found, tl.minimum(n, m) - 1), 0)
    if PARTS > R:
        common = common // PARTS * PARTS
    two = tl.where(found - common > 1, two, -1)
    one = tl.where(found - common > 0, one, -1)
    # In blocks of 64 keys from here on; the ragged block has ``size`` of them.
    size = kb - last * R
    units, others = n * R - has_last * (R - size), m * R - other_last * (R - size)
    tiles = tl.maximum((units - common * R + PARTS - 1) // PARTS, 1)
    other_tiles = tl.maximum((others - common * R + PARTS - 1) // PARTS, 1)
    gap, other_gap = PARTS * tiles - (units - common * R), PARTS * other_tiles - (others - common * R)
    turns, shared = tl.minimum(tiles, other_tiles), common * R // PARTS
    first, second = begin.to(tl.int64) * R, other.to(tl.int64) * R
    _write(
        indices, merged, n, begin, other, other_full, other_partial, last, one, two, has_last, size, kb,
        0, gap, gap, other_gap, turns, shared, units, first, second, R, PARTS, HAS_PARTIAL, CHUNK,
    )  # fmt: skip
    _write(
        indices, merged, m, other, begin, n_full, n_partial, last, one, two, other_last, size, kb,
        1, other_gap, gap, other_gap, turns, shared, units, first, second, R, PARTS, HAS_PARTIAL, CHUNK,
    )  # fmt: skip
    told += i * FIELDS
    tl.store(told, begin * R)
    tl.store(told + 1, units)
    tl.store(told + 2, other * R)
    tl.store(told + 3, others)
    tl.store(told + 4, common * R)
    tl.store(length + i, tl.maximum(units, others))


AOT_SPECS = [
    AotSpec(
        name=f"block_sparse_hopper_pairs/lists/{64 * ratio}{'/two' * (parts > 1)}{'/partial' * has_partial}",
        fn=pair_lists_kernel,
        signature={
            **dict.fromkeys(("row_start", "full", "indices", "told", "length"), "*i32"),
            "merged": "*i16",
            "partial": "*i32" if has_partial else "constexpr",
            **dict.fromkeys(("qb", "pairs", "last", "kb"), "i32"),
            **dict.fromkeys(("R", "PARTS", "HAS_PARTIAL", "CHUNK", "FIELDS"), "constexpr"),
        },
        constexprs={"R": ratio, "PARTS": parts, "HAS_PARTIAL": has_partial, "CHUNK": CHUNK, "FIELDS": FIELDS}
        | ({} if has_partial else {"partial": None}),
        options={"num_warps": 1},
        targets=("sm_90",),
    )
    for ratio, parts, has_partial in ((1, 1, True), (1, 2, False), (2, 1, True))
]
