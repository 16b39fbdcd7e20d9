"""Gluon kernel for the block mass on Hopper (sm_90): one product of queries and keys, exponentials under it.

A *job* is 256 rows of queries of one head against some tiles of 128 keys. A loader warp fetches the tiles by TMA. Two
consumer warpgroups own 128 rows each, as two halves A and Z of 64: while the product of one half runs, the exponentials of
the other do. Each lane adds up what it holds and stores one number a half and key block, which a reducer warp adds up over
the lanes, always in one order, and writes. Rows are gathered through ``token``, and ``shift`` says what is added to their
logits in units of ``log2``: minus the log-sum-exp, minus ``log2`` of the number of rows that are averaged, or minus
infinity for a row that does not count.

Barriers: ``k_full[s]`` and ``k_empty[s]`` hand over stage ``s`` of the ring of keys, ``p_full[g]`` and ``p_empty[g]`` group
``g`` of GROUP tiles of partial sums.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..block_sparse.hopper_steps import gather_rows, next_stage, release
from .hopper_specs import aot_specs

__all__ = ["AOT_SPECS", "block_mass_hopper_kernel"]


@gluon.jit
def _split(job, row_tiles, heads, splits, chunk, tiles):
    """Row tile, head, batch element, first tile and end of a job; neighbours share a head.

    A job has an even number of tiles: ``chunk`` is even, and a tile behind the last one reads as 0 and is not written.
    """
    rest = job // splits
    part = job - rest * splits
    i_head = rest // row_tiles
    begin = part * chunk
    end = gl.minimum(begin + chunk, tiles + (tiles & 1))
    return rest - i_head * row_tiles, i_head % heads, i_head // heads, begin, end


@gluon.jit
def _loader(args, D: gl.constexpr, STAGES: gl.constexpr, EVEN_K: gl.constexpr, HAS_VALID: gl.constexpr):
    """Fetch the tiles of all jobs of this program, and say which keys of the last two tiles of a job count."""
    (
        desc_k, valid, keys, jobs, programs, row_tiles, heads, splits, chunk, tiles,
        k_bufs, extras, k_full, k_empty,
    ) = args  # fmt: skip
    LINE: gl.constexpr = gl.BlockedLayout([4], [32], [1], [0])
    stage, phase = 0, 0
    for job in range(gl.program_id(0), jobs, programs):
        _, i_h, i_b, begin, end = _split(job, row_tiles, heads, splits, chunk, tiles)
        for t in range(begin, end):
            mbarrier.wait(k_empty.index(stage), phase ^ 1)
            if HAS_VALID or not EVEN_K:  # noqa: SIM102
                if HAS_VALID or t >= end - 2:
                    o_k = t * 128 + gl.arange(0, 128, layout=LINE)
                    here = o_k < keys
                    if HAS_VALID:
                        here = here & (gl.load(valid + (i_b.to(gl.int64) * keys + o_k), mask=here, other=0) != 0)
                    extras.index(stage).store(here.to(gl.float32))
                    gl.thread_barrier()
            mbarrier.expect(k_full.index(stage), desc_k.block_type.nbytes)
            tma.async_copy_global_to_shared(desc_k, [i_b, i_h, t * 128, 0], k_full.index(stage), k_bufs.index(stage))
            stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def _multiply(q_tile, k_bufs, stage, S_LAYOUT: gl.constexpr, D: gl.constexpr):
    """Begin the product of 64 queries with the keys of a stage."""
    k_tile = k_bufs.index(stage).reshape([128, D]).permute([1, 0])
    s = gl.zeros([64, 128], gl.float32, layout=S_LAYOUT)
    return warpgroup_mma(q_tile, k_tile, s, use_acc=False, is_async=True)


@gluon.jit
def _lane_sums(s, shift, scale2, extras, stage, MASKED: gl.constexpr, PER: gl.constexpr):
    """What each lane holds of the mass of PER blocks: float32 ``[PER, 128]``, 32 lanes for every 16 rows."""
    weights = gl.exp2(s * scale2 + gl.expand_dims(shift, 1))
    if MASKED:
        counts = extras.index(stage).load(gl.SliceLayout(0, s.type.layout))
        weights = gl.where(gl.expand_dims(counts, 0) > 0.0, weights, 0.0)
    # Keys 8b + 2i + j of a block lie with lane i of four, rows r and r + 8 of 16 with the same lanes.
    x = weights.reshape([4, 2, 8, PER, 16 // PER, 4, 2])
    x = gl.sum(gl.sum(gl.sum(x, 6), 4), 1)  # [4, 8, PER, 4]
    return x.permute([2, 0, 1, 3]).reshape([PER, 128])


@gluon.jit
def _keep(x_a, x_z, parts, place, i_w: gl.constexpr, JOIN: gl.constexpr):
    """Store the lane sums of a tile, of both halves together or of each."""
    if JOIN:
        parts.index(place * 2 + i_w).store(x_a + x_z)
    else:
        parts.index((place * 2 + i_w) * 2).store(x_a)
        parts.index((place * 2 + i_w) * 2 + 1).store(x_z)


@gluon.jit
def _pair(
    q_a, q_z, shift_a, shift_z, scale2, k_bufs, extras, parts, bars, stage, phase, group, group_phase, i, pairs,
    i_w: gl.constexpr, S_LAYOUT: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
    PER: gl.constexpr, JOIN: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Two tiles, pair ``i`` of a job. No product is on its way at either end: ptxas would serialise them all (C7514)."""
    k_full, k_empty, p_full, p_empty = bars
    after, after_phase = next_stage(stage, phase, STAGES)
    place = i % (GROUP // 2) * 2
    slot = group * GROUP + place
    mbarrier.wait(k_full.index(stage), phase)
    s_a = _multiply(q_a, k_bufs, stage, S_LAYOUT, D)
    s_z = _multiply(q_z, k_bufs, stage, S_LAYOUT, D)
    if place == 0:
        mbarrier.wait(p_empty.index(group), group_phase ^ 1)
    s_a = warpgroup_mma_wait(1, deps=[s_a])
    x_a = _lane_sums(s_a, shift_a, scale2, extras, stage, MASKED, PER)
    mbarrier.wait(k_full.index(after), after_phase)
    s_b = _multiply(q_a, k_bufs, after, S_LAYOUT, D)
    s_z = warpgroup_mma_wait(1, deps=[s_z])
    x_z = _lane_sums(s_z, shift_z, scale2, extras, stage, MASKED, PER)
    release(k_empty.index(stage))
    s_y = _multiply(q_z, k_bufs, after, S_LAYOUT, D)
    _keep(x_a, x_z, parts, slot, i_w, JOIN)
    s_b = warpgroup_mma_wait(1, deps=[s_b])
    x_a = _lane_sums(s_b, shift_a, scale2, extras, after, MASKED, PER)
    s_y = warpgroup_mma_wait(0, deps=[s_y])
    x_z = _lane_sums(s_y, shift_z, scale2, extras, after, MASKED, PER)
    _keep(x_a, x_z, parts, slot + 1, i_w, JOIN)
    release(k_empty.index(after))
    if (place == GROUP - 2) | (i == pairs - 1):
        mbarrier.arrive(p_full.index(group), count=1)
        group, group_phase = next_stage(group, group_phase, 2)
    stage, phase = next_stage(after, after_phase, STAGES)
    return stage, phase, group, group_phase


@gluon.jit
def _queries(q, token, start, rows, q_s, q_tile, D: gl.constexpr, DIM: gl.constexpr):
    """64 rows of queries in shared memory."""
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    gather_rows(q, token, q_s, rows, start, q_tile, D, DIM, ROWS)


@gluon.jit
def _consumer(
    args, i_w: gl.constexpr, D: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
    PER: gl.constexpr, JOIN: gl.constexpr, EVEN_K: gl.constexpr, HAS_VALID: gl.constexpr,
):  # fmt: skip
    """Weigh 128 rows, as halves A and Z of 64, against the tiles of each job."""
    (
        q, token, shift, scale2, rows, token_h, q_b, q_h, q_s, jobs, programs, row_tiles, heads, splits, chunk, tiles,
        q_bufs, k_bufs, extras, parts, bars,
    ) = args  # fmt: skip
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    S_ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    HALVES: gl.constexpr = 1 if JOIN else 2
    EDGE: gl.constexpr = HAS_VALID or not EVEN_K
    q_a, q_z = q_bufs.index(2 * i_w), q_bufs.index(2 * i_w + 1)
    parts = parts._reinterpret(gl.float32, [2 * GROUP * 2 * HALVES, PER, 128], parts.layout)
    stage, phase, group, group_phase = 0, 0, 0, 0
    for job in range(gl.program_id(0), jobs, programs):
        i_row, i_h, i_b, begin, end = _split(job, row_tiles, heads, splits, chunk, tiles)
        x_q = q + i_b.to(gl.int64) * (q_b * 8) + i_h.to(gl.int64) * (q_h * 8)
        x_token = token + i_h * token_h
        start = i_row * 256 + i_w * 128
        _queries(x_q, x_token, start, rows, q_s * 8, q_a, D, DIM)
        _queries(x_q, x_token, start + 64, rows, q_s * 8, q_z, D, DIM)
        fence_async_shared()
        gl.thread_barrier()
        x_shift = shift + (i_b * heads + i_h).to(gl.int64) * rows
        o_a = start + gl.arange(0, 64, layout=S_ROW)
        shift_a = gl.load(x_shift + o_a, mask=o_a < rows, other=float("-inf"))
        shift_z = gl.load(x_shift + o_a + 64, mask=o_a + 64 < rows, other=float("-inf"))

        pairs = (end - begin) // 2
        bulk = pairs - 1 if EDGE and not HAS_VALID else pairs
        for i in range(bulk):
            stage, phase, group, group_phase = _pair(
                q_a, q_z, shift_a, shift_z, scale2, k_bufs, extras, parts, bars, stage, phase, group, group_phase,
                i, pairs, i_w, S_LAYOUT, D, STAGES, GROUP, PER, JOIN, HAS_VALID,
            )  # fmt: skip
        for i in range(bulk, pairs):
            stage, phase, group, group_phase = _pair(
                q_a, q_z, shift_a, shift_z, scale2, k_bufs, extras, parts, bars, stage, phase, group, group_phase,
                i, pairs, i_w, S_LAYOUT, D, STAGES, GROUP, PER, JOIN, True,
            )  # fmt: skip


@gluon.jit
def _reducer(
    args, GROUP: gl.constexpr, PER: gl.constexpr, JOIN: gl.constexpr, EACH: gl.constexpr,
):  # fmt: skip
    """Add the lane sums up and write the mass of each entry: 128 rows if JOIN, else 64 // EACH."""
    out, entries, key_blocks, jobs, programs, row_tiles, heads, splits, chunk, tiles, parts, p_full, p_empty = args
    HALVES: gl.constexpr = 1 if JOIN else 2
    SETS: gl.constexpr = 2 * HALVES * PER
    LANES: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [1, 1], [1, 0])
    group, phase = 0, 0
    for job in range(gl.program_id(0), jobs, programs):
        i_row, i_h, i_b, begin, end = _split(job, row_tiles, heads, splits, chunk, tiles)
        p_out = out + (i_b * heads + i_h).to(gl.int64) * entries * key_blocks
        for first in range(begin, end, GROUP):
            mbarrier.wait(p_full.index(group), phase)
            for t in range(first, gl.minimum(first + GROUP, end)):
                x = parts.index(group * GROUP + (t - first)).load(LANES)
                x = gl.sum(x.reshape([SETS, EACH, 128 // EACH]), 2)  # [SETS, EACH]
                o_set = gl.arange(0, SETS, layout=gl.SliceLayout(1, x.type.layout))
                o_each = gl.arange(0, EACH, layout=gl.SliceLayout(0, x.type.layout))
                entry = (i_row * (2 * HALVES) + o_set // PER) * EACH
                entry = gl.expand_dims(entry, 1) + gl.expand_dims(o_each, 0)
                block = gl.expand_dims(t * PER + o_set % PER, 1)
                there = (entry < entries) & (block < key_blocks)
                gl.store(p_out + (entry.to(gl.int64) * key_blocks + block), x, mask=there)
            gl.thread_barrier()
            mbarrier.arrive(p_empty.index(group), count=1)
            group, phase = next_stage(group, phase, 2)


@gluon.jit(do_not_specialize=[
    "rows", "entries", "keys", "key_blocks", "jobs", "programs", "row_tiles", "heads", "splits", "chunk", "tiles",
    "token_h", "q_b", "q_h", "q_s",
])  # fmt: skip
def block_mass_hopper_kernel(
    desc_k, q, token, shift, valid, out, scale2, rows, entries, keys, key_blocks, jobs, programs, row_tiles, heads,
    splits, chunk, tiles, token_h, q_b: gl.int64, q_h: gl.int64, q_s: gl.int64,
    D: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, PER: gl.constexpr,
    JOIN: gl.constexpr, EACH: gl.constexpr, EVEN_K: gl.constexpr, HAS_VALID: gl.constexpr,
    CONSUMER_REGS: gl.constexpr, OTHER_REGS: gl.constexpr,
):  # fmt: skip
    """Mass of ``128 // PER`` keys on entries of 128 rows (JOIN) or ``64 // EACH``; see :func:`.hopper_launch`."""
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    ROWS_OF: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    HALVES: gl.constexpr = 1 if JOIN else 2
    q_bufs = gl.allocate_shared_memory(desc_k.dtype, [4, 64, D], ROWS_OF)
    k_bufs = gl.allocate_shared_memory(desc_k.dtype, [STAGES, 1, 1, 128, D], desc_k.layout)
    extras = gl.allocate_shared_memory(gl.float32, [STAGES, 128], FLAT)
    parts = gl.allocate_shared_memory(gl.float32, [2 * GROUP, 2 * HALVES * PER, 128], PLAIN)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    p_full = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    p_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(p_full.index(i), count=2)
        mbarrier.init(p_empty.index(i), count=1)
    fence_async_shared()
    counts = (jobs, programs, row_tiles, heads, splits, chunk, tiles)
    consumer_args = (q, token, shift, scale2, rows, token_h, q_b, q_h, q_s) + counts + (  # noqa: RUF005
        q_bufs, k_bufs, extras, parts, (k_full, k_empty, p_full, p_empty),
    )  # fmt: skip
    loader_args = (desc_k, valid, keys) + counts + (k_bufs, extras, k_full, k_empty)  # noqa: RUF005
    reducer_args = (out, entries, key_blocks) + counts + (parts, p_full, p_empty)  # noqa: RUF005
    gl.warp_specialize(
        [
            (_consumer, (consumer_args, 0, D, DIM, STAGES, GROUP, PER, JOIN, EVEN_K, HAS_VALID)),
            (_consumer, (consumer_args, 1, D, DIM, STAGES, GROUP, PER, JOIN, EVEN_K, HAS_VALID)),
            (_loader, (loader_args, D, STAGES, EVEN_K, HAS_VALID)),
            (_reducer, (reducer_args, GROUP, PER, JOIN, EACH)),
        ],
        [4, 1, 1],
        [CONSUMER_REGS, OTHER_REGS, OTHER_REGS],
    )  # fmt: skip


AOT_SPECS = aot_specs(block_mass_hopper_kernel)
