"""Gluon kernel for the block mass on Hopper (sm_90): one product of queries and keys, and exponentials.

A *job* is 256 rows of queries of one head against some tiles of 128 keys. A loader warp fetches the tiles by TMA. Four
consumer warpgroups own 64 rows each; while one waits for its product, others take exponentials. Each lane adds up what it
holds and stores one number for each key block, which a reducer warp adds up over the lanes, always in one order, and
writes. Rows are gathered through ``token``, and ``shift`` says what is added to their logits in units of ``log2``: minus
the log-sum-exp, minus ``log2`` of the number of rows that are averaged, or minus infinity for a row that does not count.

Barriers: ``k_full[s]`` and ``k_empty[s]`` hand over stage ``s`` of the ring of keys, ``p_full[g]`` and ``p_empty[g]`` group
``g`` of GROUP tiles of partial sums.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from ..block_sparse.hopper_steps import gather_rows, next_stage
from .hopper_specs import aot_specs
from .hopper_steps import tile

__all__ = ["AOT_SPECS", "block_mass_hopper_kernel"]


@gluon.jit
def _split(job, row_tiles, heads, splits, chunk, tiles):
    """Row tile, head, batch element, first tile and end of a job; neighbours share a head."""
    rest = job // splits
    part = job - rest * splits
    i_head = rest // row_tiles
    begin = part * chunk
    return rest - i_head * row_tiles, i_head % heads, i_head // heads, begin, gl.minimum(begin + chunk, tiles)


@gluon.jit
def _loader(args, D: gl.constexpr, STAGES: gl.constexpr, EVEN_K: gl.constexpr, HAS_VALID: gl.constexpr):
    """Fetch the tiles of all jobs of this program, and say which keys of the last tile of a job count."""
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
                if HAS_VALID or t == end - 1:
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
def _queries(q, token, start, rows, q_s, q_tile, D: gl.constexpr, DIM: gl.constexpr):
    """64 rows of queries in shared memory."""
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    gather_rows(q, token, q_s, rows, start, q_tile, D, DIM, ROWS)


@gluon.jit
def _consumer(
    args, i_w: gl.constexpr, D: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
    PER: gl.constexpr, JOIN: gl.constexpr, EVEN_K: gl.constexpr, HAS_VALID: gl.constexpr, POLYNOMIALS: gl.constexpr,
):  # fmt: skip
    """Weigh 64 rows against the tiles of each job."""
    (
        q, token, shift, scale2, rows, token_h, q_b, q_h, q_s, jobs, programs, row_tiles, heads, splits, chunk, tiles,
        q_bufs, k_bufs, extras, parts, bars,
    ) = args  # fmt: skip
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    S_ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    EDGE: gl.constexpr = HAS_VALID or not EVEN_K
    q_tile = q_bufs.index(i_w)
    parts = parts._reinterpret(gl.float32, [2 * GROUP * 4, PER, 128], parts.layout)
    stage, phase, group, group_phase = 0, 0, 0, 0
    for job in range(gl.program_id(0), jobs, programs):
        i_row, i_h, i_b, begin, end = _split(job, row_tiles, heads, splits, chunk, tiles)
        x_q = q + i_b.to(gl.int64) * (q_b * 8) + i_h.to(gl.int64) * (q_h * 8)
        x_token = token + i_h * token_h
        start = i_row * 256 + i_w * 64
        _queries(x_q, x_token, start, rows, q_s * 8, q_tile, D, DIM)
        fence_async_shared()
        gl.thread_barrier()
        x_shift = shift + (i_b * heads + i_h).to(gl.int64) * rows
        o_a = start + gl.arange(0, 64, layout=S_ROW)
        row_shift = gl.load(x_shift + o_a, mask=o_a < rows, other=float("-inf"))
        count = end - begin
        bulk = count - 1 if EDGE and not HAS_VALID else count
        for i in range(bulk):
            stage, phase, group, group_phase = tile(
                q_tile, row_shift, scale2, k_bufs, extras, parts, bars, stage, phase, group, group_phase,
                i, count, i_w, S_LAYOUT, D, STAGES, GROUP, PER, HAS_VALID, POLYNOMIALS,
            )  # fmt: skip
        for i in range(bulk, count):
            stage, phase, group, group_phase = tile(
                q_tile, row_shift, scale2, k_bufs, extras, parts, bars, stage, phase, group, group_phase,
                i, count, i_w, S_LAYOUT, D, STAGES, GROUP, PER, True, POLYNOMIALS,
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
                if JOIN:
                    x = gl.sum(gl.sum(x.reshape([2, 2, PER, 1, 128]), 1), 3).reshape([SETS, EACH])
                else:
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
    CONSUMER_REGS: gl.constexpr, OTHER_REGS: gl.constexpr, POLYNOMIALS: gl.constexpr,
):  # fmt: skip
    """Mass of ``128 // PER`` keys on entries of 128 rows (JOIN) or ``64 // EACH``; see :func:`.hopper_launch`."""
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    ROWS_OF: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    q_bufs = gl.allocate_shared_memory(desc_k.dtype, [4, 64, D], ROWS_OF)
    k_bufs = gl.allocate_shared_memory(desc_k.dtype, [STAGES, 1, 1, 128, D], desc_k.layout)
    extras = gl.allocate_shared_memory(gl.float32, [STAGES, 128], FLAT)
    parts = gl.allocate_shared_memory(gl.float32, [2 * GROUP, 4 * PER, 128], PLAIN)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    p_full = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    p_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=4)
    for i in gl.static_range(2):
        mbarrier.init(p_full.index(i), count=4)
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
            (_consumer, (consumer_args, 0, D, DIM, STAGES, GROUP, PER, JOIN, EVEN_K, HAS_VALID, POLYNOMIALS)),
            (_consumer, (consumer_args, 1, D, DIM, STAGES, GROUP, PER, JOIN, EVEN_K, HAS_VALID, POLYNOMIALS)),
            (_consumer, (consumer_args, 2, D, DIM, STAGES, GROUP, PER, JOIN, EVEN_K, HAS_VALID, POLYNOMIALS)),
            (_consumer, (consumer_args, 3, D, DIM, STAGES, GROUP, PER, JOIN, EVEN_K, HAS_VALID, POLYNOMIALS)),
            (_loader, (loader_args, D, STAGES, EVEN_K, HAS_VALID)),
            (_reducer, (reducer_args, GROUP, PER, JOIN, EACH)),
        ],
        [4, 4, 4, 1, 1],
        [CONSUMER_REGS, CONSUMER_REGS, CONSUMER_REGS, OTHER_REGS, OTHER_REGS],
    )  # fmt: skip


AOT_SPECS = aot_specs(block_mass_hopper_kernel)
