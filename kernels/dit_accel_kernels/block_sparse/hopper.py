"""Gluon kernel for Hopper (sm_90): a producer warp fetches tiles by TMA, two warpgroups multiply 64 query rows each.

A *job* is one block of 128 queries of one head. Its *tiles* are, in this order, all pooled keys if a remainder is kept
and the blocks of its list from the last to the first, so that the one block that can be ragged is the first of the list.
Both sides derive jobs and tiles from the same numbers and meet at barriers only:

- ``k_full[s]``, ``v_full[s]``: stage ``s`` of the ring was filled by TMA. A position of the ring is a counter over all
  tiles of all jobs of a program, kept as a stage and a phase; keys and values of a tile have the same.
- ``empty[s]``: both consumers have turned the keys of the tile in stage ``s`` into weights and have added the values of
  the tile before it; so the values of a tile are given back one tile after its keys.
- ``q_full`` / ``q_empty``: the same for the 64 query rows of each consumer; their buffer also takes the output out.

Consumers issue the product with the next keys before that with the values of the tile before, and the exponentials of a
tile run under the latter. Logits are in units of ``scale * log2(e)`` once scaled.
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
from triton.language import int64

from .hopper_specs import aot_specs
from .hopper_steps import finish, first_tile, gather_rows, next_stage, pool_bias, release, step

__all__ = ["AOT_SPECS", "block_sparse_hopper_kernel"]


@gluon.jit
def _read_row(row_start, full, partial, indices, i_row, kb, EVEN_K: gl.constexpr, HAS_PARTIAL: gl.constexpr):
    """Start and length of a list, the position to visit first, and whether that is the ragged block."""
    begin = gl.load(row_start + i_row).to(gl.int64)
    n_full = gl.load(full + i_row)
    n = n_full
    if HAS_PARTIAL:
        n += gl.load(partial + i_row)
    first = n - 1
    ragged = n < 0
    if not EVEN_K:
        # Ids are sorted: the ragged block is the last of the whole ones or the last of the partial ones.
        ragged = gl.load(indices + begin + (n - 1), mask=n > 0, other=-1) + 1 == kb
        if HAS_PARTIAL:
            middle = gl.load(indices + begin + (n_full - 1), mask=n_full > 0, other=-1) + 1 == kb
            first = gl.where(middle, n_full - 1, first)
            ragged = ragged | middle
    return begin, n, first, ragged


@gluon.jit
def _job(job, qb, heads):
    """Query block, head and batch element of a job; neighbours share a head, whose keys stay in L2."""
    rest = job // qb
    return job - rest * qb, rest % heads, rest // heads


@gluon.jit
def _program(anything):
    """The program's number, read on the spot: LLVM shares ``program_id`` between the roles, which costs a spill."""
    return gl.inline_asm_elementwise(
        "mov.u32 $0, %ctaid.x; // $1", "=r,r", [anything], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _load_tile(desc_k, desc_v, i_b, i_h, start, k_bufs, v_bufs, bars, stage, phase, STAGES: gl.constexpr):
    """Fill one stage of both rings with the keys and values from token ``start``."""
    k_full, v_full, empty, _ = bars
    after, after_phase = next_stage(stage, phase, STAGES)
    mbarrier.wait(empty.index(stage), phase ^ 1)
    mbarrier.expect(k_full.index(stage), desc_k.block_type.nbytes)
    tma.async_copy_global_to_shared(desc_k, [i_b, i_h, start, 0], k_full.index(stage), k_bufs.index(stage))
    # The values that were here are done with one tile after their keys.
    mbarrier.wait(empty.index(after), after_phase ^ 1)
    mbarrier.expect(v_full.index(stage), desc_v.block_type.nbytes)
    tma.async_copy_global_to_shared(desc_v, [i_b, i_h, start, 0], v_full.index(stage), v_bufs.index(stage))
    return after, after_phase


@gluon.jit
def _producer(
    desc_q, desc_k, desc_v, desc_pk, desc_pv, row_start, full, partial, indices,
    qb, kb, heads, jobs, programs, list_b, list_h, q_bufs, k_bufs, v_bufs, q_full, q_empty, kv_bars,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr, EVEN_K: gl.constexpr,
    HAS_PARTIAL: gl.constexpr, HAS_POOLED: gl.constexpr, GATHER: gl.constexpr,
):  # fmt: skip
    stage, phase, q_stage, q_phase = 0, 0, 0, 0
    for job in range(_program(jobs), jobs, programs):
        i_q, i_h, i_b = _job(job, qb, heads)
        i_row = i_b * list_b + i_h * list_h + i_q
        begin, n, first, _ = _read_row(row_start, full, partial, indices, i_row, kb, EVEN_K, HAS_PARTIAL)
        if not GATHER:
            for w in gl.static_range(2):
                mbarrier.wait(q_empty.index(2 * q_stage + w), q_phase ^ 1)
                mbarrier.expect(q_full.index(2 * q_stage + w), desc_q.block_type.nbytes)
                tma.async_copy_global_to_shared(
                    desc_q, [i_b, i_h, i_q * 128 + w * 64, 0], q_full.index(2 * q_stage + w),
                    q_bufs.index(2 * q_stage + w),
                )  # fmt: skip
            q_stage, q_phase = next_stage(q_stage, q_phase, Q_STAGES)
        if HAS_POOLED:
            for start in range(0, kb, BLOCK_N):
                stage, phase = _load_tile(
                    desc_pk, desc_pv, i_b, i_h, start, k_bufs, v_bufs, kv_bars, stage, phase, STAGES
                )
        for t in range(n):
            place = n - 1 - t
            if HAS_PARTIAL and not EVEN_K:
                place = gl.where(t == 0, first, gl.where(place == first, n - 1, place))
            start = gl.load(indices + begin + place) * BLOCK_N
            stage, phase = _load_tile(desc_k, desc_v, i_b, i_h, start, k_bufs, v_bufs, kv_bars, stage, phase, STAGES)


@gluon.jit
def _consumer(
    args, i_w: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr,
    EVEN_K: gl.constexpr, HAS_PARTIAL: gl.constexpr, HAS_POOLED: gl.constexpr, GATHER: gl.constexpr,
    HAS_LSE: gl.constexpr, PINGPONG: gl.constexpr,
):  # fmt: skip
    (
        desc_o, q, out, lse, row_start, full, partial, indices, table, head_row, bias, bits, scale2,
        sq, tail, words, qb, kb, heads, jobs, programs, table_s, q_b, q_h, q_s, out_b, out_h, out_s,
        list_b, list_h, bits_b, bits_h, bias_b, bias_h, q_bufs, k_bufs, v_bufs, q_full, q_empty, kv_bars, turn,
    ) = args  # fmt: skip
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    stage, phase, done, turn_phase = 0, 0, 0, 1 - i_w
    for job in range(_program(jobs), jobs, programs):
        i_q, i_h, i_b = _job(job, qb, heads)
        w_h, w_b = i_h.to(gl.int64), i_b.to(gl.int64)
        i_row = i_b * list_b + i_h * list_h + i_q
        row = _read_row(row_start, full, partial, indices, i_row, kb, EVEN_K, HAS_PARTIAL)
        n, ragged = row[1], row[3]
        slot = done % Q_STAGES * 2 + i_w
        q_buf = q_bufs.index(slot)
        q_tile = q_buf.reshape([64, D])
        if GATHER:
            p_table = table + gl.load(head_row + i_h) * table_s
            o_m = i_q * 128 + i_w * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, ROWS))
            token = gl.load(p_table + o_m, mask=o_m < sq, other=0).to(gl.int64)
            gather_rows(q + w_b * q_b + w_h * q_h, token, o_m < sq, q_tile, q_s, D, ROWS)
        else:
            mbarrier.wait(q_full.index(slot), done // Q_STAGES & 1)

        acc = gl.zeros([64, D], gl.float32, layout=O_LAYOUT)
        row_max = gl.full([64], -1.0e30, gl.float32, layout=gl.SliceLayout(1, S_LAYOUT))
        row_sum = gl.zeros([64], gl.float32, layout=gl.SliceLayout(1, S_LAYOUT))
        if HAS_POOLED or n > 0:
            limit = gl.where(ragged, tail, BLOCK_N)
            if HAS_POOLED:
                p_bias = bias + (i_b * bias_b + i_h * bias_h)
                p_bits = bits + (i_b * bits_b + i_h * bits_h + i_q * words)
                extra = pool_bias(p_bias, p_bits, 0, kb, BLOCK_N)
                p, row_max, row_sum = first_tile(
                    q_tile, k_bufs, kv_bars, stage, phase, scale2, extra, 0, 2, S_LAYOUT, P_LAYOUT, BLOCK_N, D
                )
                for start in range(BLOCK_N, kb, BLOCK_N):
                    extra = pool_bias(p_bias, p_bits, start, kb, BLOCK_N)
                    acc, p, row_max, row_sum, stage, phase, turn_phase = step(
                        acc, p, row_max, row_sum, q_tile, k_bufs, v_bufs, kv_bars, turn, i_w, turn_phase, stage, phase,
                        scale2, extra, 0, 2, S_LAYOUT, P_LAYOUT, O_LAYOUT, BLOCK_N, D, STAGES, PINGPONG,
                    )  # fmt: skip
                plain = n
                if not EVEN_K:
                    # The block that may be ragged, in a loop of at most one round.
                    plain = gl.maximum(n - 1, 0)
                    for _t in range(plain, n):
                        acc, p, row_max, row_sum, stage, phase, turn_phase = step(
                            acc, p, row_max, row_sum, q_tile, k_bufs, v_bufs, kv_bars, turn, i_w, turn_phase, stage,
                            phase, scale2, 0, limit, 1, S_LAYOUT, P_LAYOUT, O_LAYOUT, BLOCK_N, D, STAGES, PINGPONG,
                        )  # fmt: skip
            else:
                KIND: gl.constexpr = 0 if EVEN_K else 1
                p, row_max, row_sum = first_tile(
                    q_tile, k_bufs, kv_bars, stage, phase, scale2, 0, limit, KIND, S_LAYOUT, P_LAYOUT, BLOCK_N, D
                )
                plain = n - 1
            for _t in range(plain):
                acc, p, row_max, row_sum, stage, phase, turn_phase = step(
                    acc, p, row_max, row_sum, q_tile, k_bufs, v_bufs, kv_bars, turn, i_w, turn_phase, stage, phase,
                    scale2, 0, 0, 0, S_LAYOUT, P_LAYOUT, O_LAYOUT, BLOCK_N, D, STAGES, PINGPONG,
                )  # fmt: skip
            mbarrier.wait(kv_bars[1].index(stage), phase)
            acc = warpgroup_mma(p, v_bufs.index(stage).reshape([BLOCK_N, D]), acc, is_async=True)
            # These values are given back with the first tile of the next job.
            acc, p = warpgroup_mma_wait(0, deps=[acc, p])
            stage, phase = next_stage(stage, phase, STAGES)
        finish(
            acc, row_max, row_sum, q_tile, q_buf, desc_o, out, lse, table, head_row, table_s, i_q, i_h, i_b, heads,
            out_b, out_h, out_s, i_w, D, GATHER, HAS_LSE, ROWS, O_LAYOUT,
        )  # fmt: skip
        if not GATHER:
            release(q_empty.index(slot))
            done += 1


@gluon.jit(do_not_specialize=[
    "sq", "tail", "words", "qb", "kb", "heads", "jobs", "programs", "table_s",
    "list_b", "list_h", "bits_b", "bits_h", "bias_b", "bias_h",
    "q_b", "q_h", "q_s", "out_b", "out_h", "out_s",
])  # fmt: skip
def block_sparse_hopper_kernel(
    desc_q, desc_k, desc_v, desc_o, desc_pk, desc_pv, q, out, lse, row_start, full, partial, indices, table, head_row,
    bias, bits, scale2, sq, tail, words, qb, kb, heads, jobs, programs,
    table_s: int64, q_b: int64, q_h: int64, q_s: int64, out_b: int64, out_h: int64, out_s: int64,
    list_b, list_h, bits_b, bits_h, bias_b, bias_h,
    D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr, EVEN_K: gl.constexpr,
    HAS_PARTIAL: gl.constexpr, HAS_POOLED: gl.constexpr, GATHER: gl.constexpr, HAS_LSE: gl.constexpr,
    PINGPONG: gl.constexpr, CONSUMER_REGS: gl.constexpr, PRODUCER_REGS: gl.constexpr,
):  # fmt: skip
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    q_bufs = gl.allocate_shared_memory(desc_k.dtype, [2 * Q_STAGES, 1, 1, 64, D], desc_k.layout)
    k_bufs = gl.allocate_shared_memory(desc_k.dtype, [STAGES, 1, 1, BLOCK_N, D], desc_k.layout)
    v_bufs = gl.allocate_shared_memory(desc_v.dtype, [STAGES, 1, 1, BLOCK_N, D], desc_v.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    never = gl.allocate_shared_memory(gl.int64, [1], BAR)
    q_full = gl.allocate_shared_memory(gl.int64, [2 * Q_STAGES, 1], BAR)
    q_empty = gl.allocate_shared_memory(gl.int64, [2 * Q_STAGES, 1], BAR)
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    for i in gl.static_range(2 * Q_STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(turn.index(i), count=1)
    mbarrier.init(never, count=1)
    fence_async_shared()
    kv_bars = (k_full, v_full, empty, never)
    shared_args = (
        desc_o, q, out, lse, row_start, full, partial, indices, table, head_row, bias, bits, scale2,
        sq, tail, words, qb, kb, heads, jobs, programs, table_s, q_b, q_h, q_s, out_b, out_h, out_s,
        list_b, list_h, bits_b, bits_h, bias_b, bias_h, q_bufs, k_bufs, v_bufs, q_full, q_empty, kv_bars, turn,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_consumer, (
                shared_args, 0, D, BLOCK_N, STAGES, Q_STAGES, EVEN_K, HAS_PARTIAL, HAS_POOLED, GATHER, HAS_LSE,
                PINGPONG,
            )),
            (_consumer, (
                shared_args, 1, D, BLOCK_N, STAGES, Q_STAGES, EVEN_K, HAS_PARTIAL, HAS_POOLED, GATHER, HAS_LSE,
                PINGPONG,
            )),
            (_producer, (
                desc_q, desc_k, desc_v, desc_pk, desc_pv, row_start, full, partial, indices,
                qb, kb, heads, jobs, programs, list_b, list_h, q_bufs, k_bufs, v_bufs, q_full, q_empty, kv_bars,
                BLOCK_N, STAGES, Q_STAGES, EVEN_K, HAS_PARTIAL, HAS_POOLED, GATHER,
            )),
        ],
        [4, 1],
        [CONSUMER_REGS, PRODUCER_REGS],
    )  # fmt: skip


AOT_SPECS = aot_specs(block_sparse_hopper_kernel)
