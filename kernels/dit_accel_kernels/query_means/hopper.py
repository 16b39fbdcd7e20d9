"""Gluon kernel for Hopper (sm_90): mean queries against all keys, with the sums over all keys and over those kept exact.

A program belongs to a *group*, as its *member* number ``r``. The tiles of 64 keys of all heads stand in a line, and each
group does an equal stretch of it; its members do so for different tiles of mean queries, so that they read the same keys
and values at about the same time and these come from the L2 cache. What a stretch has of one head is a *segment*: it leaves
sums and accumulators, relative to its own maximum, that :mod:`.merge` puts together.

A loader warp fetches tiles by TMA, WARPGROUPS consumers own 64 mean queries each. A consumer multiplies its weights with
the values of a tile twice, once with the weights of blocks that are not kept set to 0. With OVERLAP its exponentials run
under these products, else those of another consumer do. As in :mod:`..block_sparse.hopper`, weights are relative to the
maximum of the first tile with FAST; where a sum says that one has left the range of its type, ``flags`` keeps it, and a
second launch, with RETRY and without FAST, does these segments again. Barriers: ``k_full[s]``, ``v_full[s]``: stage
``s`` of the ring was filled; ``empty[s]``: all consumers have done with the keys of the tile in stage ``s`` and with the
values of the tile before it; ``q_full``, ``q_empty``: queries of a segment.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from ..block_sparse.hopper_steps import next_stage
from .hopper_specs import aot_specs
from .hopper_steps import careful_tiles, first_tile, overlapped_tiles

__all__ = ["AOT_SPECS", "query_means_hopper_kernel"]


@gluon.jit
def _stretch(members, share, total):
    """Member, group, and first and last position of this program's stretch of all tiles of all heads."""
    pid = gl.program_id(0)
    group = pid // members
    begin = group * share
    return pid - group * members, group, begin, gl.minimum(begin + share, total)


@gluon.jit
def _segment(position, end, tiles):
    """The head of a position, the tile that it has there, and how many tiles of this head are in the stretch."""
    plane = position // tiles
    first = position - plane * tiles
    return plane, first, gl.minimum(tiles - first, end - position)


@gluon.jit
def _is_wrong(flags, slot, WARPGROUPS: gl.constexpr):
    """Whether the fast pass has left any row of a segment to be done again."""
    found = gl.load(flags + slot * WARPGROUPS)
    for w in gl.static_range(1, WARPGROUPS):
        found |= gl.load(flags + slot * WARPGROUPS + w)
    return found


@gluon.jit
def _load(desc_k, desc_v, i_b, i_h, tile, k_bufs, v_bufs, bars, stage, phase, STAGES: gl.constexpr):
    k_full, v_full, empty = bars
    after, after_phase = next_stage(stage, phase, STAGES)
    mbarrier.wait(empty.index(stage), phase ^ 1)
    mbarrier.expect(k_full.index(stage), desc_k.block_type.nbytes)
    tma.async_copy_global_to_shared(desc_k, [i_b, i_h, tile * 64, 0], k_full.index(stage), k_bufs.index(stage))
    # The values that were here are done with one tile after their keys.
    mbarrier.wait(empty.index(after), after_phase ^ 1)
    mbarrier.expect(v_full.index(stage), desc_v.block_type.nbytes)
    tma.async_copy_global_to_shared(desc_v, [i_b, i_h, tile * 64, 0], v_full.index(stage), v_bufs.index(stage))
    return after, after_phase


@gluon.jit
def _loader(args, WARPGROUPS: gl.constexpr, STAGES: gl.constexpr, RETRY: gl.constexpr):
    """Fetch queries and tiles of all segments of this program; the last tile, which may be ragged, comes first."""
    (
        desc_q, desc_k, desc_v, flags, heads, row_tiles, members, share, total, tiles,
        q_bufs, k_bufs, v_bufs, q_full, q_empty, bars,
    ) = args  # fmt: skip
    member, group, begin, end = _stretch(members, share, total)
    stage, phase, q_phase = 0, 0, 0
    for i_row in range(member, row_tiles, members):
        position = begin
        while position < end:
            plane, first, count = _segment(position, end, tiles)
            todo = 1
            if RETRY:
                todo = _is_wrong(flags, (group + plane) * row_tiles + i_row, WARPGROUPS)
            if todo != 0:
                i_b, i_h = plane // heads, plane % heads
                mbarrier.wait(q_empty, q_phase ^ 1)
                mbarrier.expect(q_full, WARPGROUPS * desc_q.block_type.nbytes)
                for w in gl.static_range(WARPGROUPS):
                    row = (i_row * WARPGROUPS + w) * 64
                    tma.async_copy_global_to_shared(desc_q, [i_b, i_h, row, 0], q_full, q_bufs.index(w))
                q_phase ^= 1
                last = first + count - 1
                stage, phase = _load(desc_k, desc_v, i_b, i_h, last, k_bufs, v_bufs, bars, stage, phase, STAGES)
                for t in range(first, last):
                    stage, phase = _load(desc_k, desc_v, i_b, i_h, t, k_bufs, v_bufs, bars, stage, phase, STAGES)
            position += count


@gluon.jit
def _leave(acc, out, slot, which: gl.constexpr, i_w: gl.constexpr, ROWS: gl.constexpr, D: gl.constexpr):
    """Write the accumulator of a segment, 64 of its ROWS rows."""
    o_m = i_w * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, acc.type.layout))
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, acc.type.layout))
    out += (slot * 2 + which).to(gl.int64) * (ROWS * D)
    gl.store(out + gl.expand_dims(o_m * D, 1) + gl.expand_dims(o_d, 0), acc)


@gluon.jit
def _consumer(
    args, i_w: gl.constexpr, D: gl.constexpr, BLOCK_K: gl.constexpr, WARPGROUPS: gl.constexpr, STAGES: gl.constexpr,
    FAST: gl.constexpr, OVERLAP: gl.constexpr, RETRY: gl.constexpr,
):  # fmt: skip
    """Weigh 64 mean queries against the tiles of each segment."""
    (
        bits, sums, accs, flags, scale2, heads, rows, sk, words, bits_b, bits_h, row_tiles, members, share, total, tiles,
        q_bufs, k_bufs, v_bufs, q_full, q_empty, bars,
    ) = args  # fmt: skip
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    PER: gl.constexpr = BLOCK_K // 64
    ROWS: gl.constexpr = WARPGROUPS * 64
    q_tile = q_bufs.index(i_w).reshape([64, D])
    o_row = i_w * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, S_LAYOUT))
    member, group, begin, end = _stretch(members, share, total)
    stage, phase, q_phase = 0, 0, 0
    for i_row in range(member, row_tiles, members):
        position = begin
        o_m = i_row * ROWS + o_row
        while position < end:
            plane, first, count = _segment(position, end, tiles)
            slot = (group + plane) * row_tiles + i_row
            todo = 1
            if RETRY:
                todo = _is_wrong(flags, slot, WARPGROUPS)
            if todo != 0:
                p_bits = bits + (plane // heads) * bits_b + (plane % heads) * bits_h + o_m * words
                mbarrier.wait(q_full, q_phase)
                q_phase ^= 1
                s = first_tile(q_tile, k_bufs, bars, stage, phase, first + count - 1, sk, S_LAYOUT, D)
                if OVERLAP:
                    acc_all, acc_kept, row_max, sum_all, sum_kept, stage, phase = overlapped_tiles(
                        s, q_tile, k_bufs, v_bufs, q_empty, bars, stage, phase, p_bits, o_m < rows, first, count,
                        scale2, D, STAGES, PER, O_LAYOUT,
                    )  # fmt: skip
                else:
                    acc_all, acc_kept, row_max, sum_all, sum_kept, stage, phase = careful_tiles(
                        s, q_tile, k_bufs, v_bufs, q_empty, bars, stage, phase, p_bits, o_m < rows, first, count,
                        scale2, D, STAGES, PER, O_LAYOUT, FAST,
                    )  # fmt: skip
                _leave(acc_all, accs, slot, 0, i_w, ROWS, D)
                _leave(acc_kept, accs, slot, 1, i_w, ROWS, D)
                p_sum = sums + slot.to(gl.int64) * (3 * ROWS) + o_row
                gl.store(p_sum, row_max)
                gl.store(p_sum + ROWS, sum_all)
                gl.store(p_sum + 2 * ROWS, sum_kept)
                if FAST:
                    # The first tile has a weight of 1. A sum up to 2^100 says that none has overflown; NaN fails as well.
                    gl.store(flags + slot * WARPGROUPS + i_w, gl.max(gl.where(sum_all < 1.2e30, 0, 1), 0))
            position += count


@gluon.jit(do_not_specialize=[
    "heads", "rows", "sk", "words", "bits_b", "bits_h", "row_tiles", "members", "share", "total", "tiles",
])  # fmt: skip
def query_means_hopper_kernel(
    desc_q, desc_k, desc_v, bits, sums, accs, flags, scale2, heads, rows, sk, words, bits_b, bits_h,
    row_tiles, members, share, total, tiles,
    D: gl.constexpr, BLOCK_K: gl.constexpr, WARPGROUPS: gl.constexpr, STAGES: gl.constexpr, FAST: gl.constexpr,
    OVERLAP: gl.constexpr, RETRY: gl.constexpr, CONSUMER_REGS: gl.constexpr, LOADER_REGS: gl.constexpr,
):  # fmt: skip
    """Sums and accumulators of each segment; see :func:`.hopper_launch.residual_hopper` for the arguments."""
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    q_bufs = gl.allocate_shared_memory(desc_q.dtype, [WARPGROUPS, 1, 1, 64, D], desc_q.layout)
    k_bufs = gl.allocate_shared_memory(desc_k.dtype, [STAGES, 1, 1, 64, D], desc_k.layout)
    v_bufs = gl.allocate_shared_memory(desc_v.dtype, [STAGES, 1, 1, 64, D], desc_v.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    q_full = gl.allocate_shared_memory(gl.int64, [1], BAR)
    q_empty = gl.allocate_shared_memory(gl.int64, [1], BAR)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(empty.index(i), count=WARPGROUPS)
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=WARPGROUPS)
    fence_async_shared()
    shape = (row_tiles, members, share, total, tiles)
    shared = (q_bufs, k_bufs, v_bufs, q_full, q_empty, (k_full, v_full, empty))
    consumer_args = (bits, sums, accs, flags, scale2, heads, rows, sk, words, bits_b, bits_h) + shape + shared  # noqa: RUF005
    loader_args = (desc_q, desc_k, desc_v, flags, heads) + shape + shared  # noqa: RUF005
    if WARPGROUPS == 2:
        gl.warp_specialize(
            [
                (_consumer, (consumer_args, 0, D, BLOCK_K, WARPGROUPS, STAGES, FAST, OVERLAP, RETRY)),
                (_consumer, (consumer_args, 1, D, BLOCK_K, WARPGROUPS, STAGES, FAST, OVERLAP, RETRY)),
                (_loader, (loader_args, WARPGROUPS, STAGES, RETRY)),
            ],
            [4, 1],
            [CONSUMER_REGS, LOADER_REGS],
        )
    else:
        gl.warp_specialize(
            [
                (_consumer, (consumer_args, 0, D, BLOCK_K, WARPGROUPS, STAGES, FAST, OVERLAP, RETRY)),
                (_consumer, (consumer_args, 1, D, BLOCK_K, WARPGROUPS, STAGES, FAST, OVERLAP, RETRY)),
                (_consumer, (consumer_args, 2, D, BLOCK_K, WARPGROUPS, STAGES, FAST, OVERLAP, RETRY)),
                (_loader, (loader_args, WARPGROUPS, STAGES, RETRY)),
            ],
            [4, 4, 1],
            [CONSUMER_REGS, CONSUMER_REGS, LOADER_REGS],
        )


AOT_SPECS = aot_specs(query_means_hopper_kernel)
