"""Gluon kernel for Hopper (sm_90) and query blocks of 64: two of them are a job, one for each consumer.

The roles are those of :mod:`.hopper`. What two neighbouring query blocks both visit is fetched once; tiles that only one
of them visits come in turn for the first and the second consumer, each of which skips what is not its own
(:mod:`.hopper_pairs_load`). So consumers multiply only what their list has, and both are busy all the time while the rows
are about equally long. Tiles have 64 keys at head sizes over 64, since two of them are in use by each consumer, and 128
below.

A job ends before the next begins, as in :mod:`.hopper_short`: a consumer that waited for its next tile with values that it
still needs would keep the ring from moving on while the other one has more tiles. All that a consumer skips it waits for
and gives back all the same; else it could be left more than a round behind, where phases mean something else. Whoever gives
back a tile has done with the values of the one before. The second consumer begins a job when the first one has turned its
first tile into weights (``behind``), so that one multiplies while the other is at a border.
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

from .hopper import _number, _queries, _read
from .hopper_pairs_load import pairs_producer
from .hopper_pairs_specs import pairs_aot_specs
from .hopper_pairs_steps import fast_pair_step, first_pair_tile, pair_step, skip
from .hopper_steps import any_vote, finish, inverse_sum, next_stage, put_lse, total, vote

__all__ = ["AOT_SPECS", "block_sparse_pairs_kernel"]


@gluon.jit
def _consumer(
    args, i_w: gl.constexpr, D: gl.constexpr, DIM: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr,
    MORE_BIASED: gl.constexpr, GATHER: gl.constexpr, HAS_LSE: gl.constexpr, FAST: gl.constexpr,
    FETCHED: gl.constexpr,
):  # fmt: skip
    (
        desc_o, q, out, lse, table, head_row, scale2, heads, table_s, q_b, q_h, q_s, out_b, out_h, out_s,
        q_bufs, k_bufs, v_bufs, extras, infos, failed, q_full, q_empty, bars, behind,
    ) = args  # fmt: skip
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    Q_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, S_LAYOUT, 2)
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    BOTH: gl.constexpr = D == 64
    q_buf = q_bufs.index(i_w)
    q_tile = q_buf.reshape([64, D])
    # What is told to this consumer, in one of two slots in turn.
    info = infos[i_w]
    wrong_jobs, all_votes = failed
    votes = all_votes.slice(i_w, 1)
    stage, phase, slot = STAGES - 1, 1, 0
    acc = gl.zeros([64, D], gl.float32, layout=O_LAYOUT)
    mbarrier.wait(q_full.index(i_w), 0)
    told = _read(info, 0, BOTH)
    job = _number(told, 0)
    q_op = _queries(
        q, table, head_row, q_b, q_h, q_s, table_s, _number(told, 4), _number(told, 5), _number(told, 6), q_tile, i_w,
        D, DIM, GATHER and not FETCHED, ROWS, Q_LAYOUT,
    )  # fmt: skip
    while job != -1:
        stage, phase = skip(bars, stage, phase, i_w, STAGES)
        stage, phase = next_stage(stage, phase, STAGES)
        if i_w == 1:
            mbarrier.wait(behind, slot)
        p, row_max, shares = first_pair_tile(
            q_op, k_bufs, extras, bars, stage, phase, scale2, _number(told, 3) & 2, S_LAYOUT, P_LAYOUT, D, TILE
        )
        # The output of the job before has left the buffer of the queries.
        if not GATHER:
            tma.store_wait(0)
        gl.thread_barrier()
        mbarrier.arrive(bars[2].index(stage), count=1)
        mbarrier.arrive(q_empty.index(i_w), count=1)
        if i_w == 0:
            mbarrier.arrive(behind, count=1)
        if FAST:
            # No key of this tile counts for the row: the weights of the others are relative to 0.
            row_max = gl.where(row_max == -1.0e30, 0.0, row_max)
        n_biased, n_plain, careful, twos = (
            _number(told, 1) - 1, _number(told, 2), _number(told, 3) & 1, _number(told, 7) & 65535
        )  # fmt: skip
        if not FAST:
            careful = 1
        if FAST:
            if MORE_BIASED:
                for t in range(gl.where(careful == 0, n_biased, 0)):
                    acc, p, shares, stage, phase = fast_pair_step(
                        acc, p, row_max, shares, q_op, k_bufs, v_bufs, extras, bars, stage, phase,
                        t < twos, scale2, t > 0, S_LAYOUT, D, STAGES, TILE, True,
                    )  # fmt: skip
            # Tiles that come alone, and those that both consumers take or only this one has left.
            n_alone = gl.minimum(gl.maximum(twos - n_biased, 0), n_plain)
            for t in range(gl.where(careful == 0, n_alone, 0)):
                acc, p, shares, stage, phase = fast_pair_step(
                    acc, p, row_max, shares, q_op, k_bufs, v_bufs, extras, bars, stage, phase, True, scale2,
                    t + n_biased > 0, S_LAYOUT, D, STAGES, TILE, False,
                )  # fmt: skip
            for t in range(gl.where(careful == 0, n_plain - n_alone, 0)):
                acc, p, shares, stage, phase = fast_pair_step(
                    acc, p, row_max, shares, q_op, k_bufs, v_bufs, extras, bars, stage, phase, False, scale2,
                    t + n_biased + n_alone > 0, S_LAYOUT, D, STAGES, TILE, False,
                )  # fmt: skip
        if MORE_BIASED:
            for t in range(gl.where(careful != 0, n_biased, 0)):
                acc, p, row_max, shares, stage, phase = pair_step(
                    acc, p, row_max, shares, q_op, k_bufs, v_bufs, extras, bars, stage, phase,
                    t < twos, scale2, t > 0, S_LAYOUT, D, STAGES, TILE, True,
                )  # fmt: skip
        for t in range(gl.where(careful != 0, n_plain, 0)):
            acc, p, row_max, shares, stage, phase = pair_step(
                acc, p, row_max, shares, q_op, k_bufs, v_bufs, extras, bars, stage, phase,
                t + n_biased < twos, scale2, t + n_biased > 0, S_LAYOUT, D, STAGES, TILE, False,
            )  # fmt: skip
        mbarrier.wait(bars[1].index(stage), phase)
        acc = warpgroup_mma(
            p, v_bufs.index(stage).reshape([TILE, D]), acc, use_acc=n_biased + n_plain > 0, is_async=True
        )
        row_sum = total(shares, S_LAYOUT)
        done = _read(info, slot, BOTH)
        done_job, o_q, o_h, o_b = _number(done, 0), _number(done, 4), _number(done, 5), _number(done, 6)
        if FAST:
            # Weights and their sums within 2^-60 and 2^100: none has overflown, none that matters is lost.
            fine = (row_sum > 8.7e-19) & (row_sum < 1.2e30)
            vote(votes, gl.where(fine | ((_number(done, 3) & 1) != 0), 0, 1))
        done_slot = slot
        slot ^= 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        # The next job is told after the last tiles of this one, those of the other consumer among them.
        stage, phase = skip(bars, stage, phase, _number(done, 7) >> 16, STAGES)
        mbarrier.wait(q_full.index(i_w), slot)
        told = _read(info, slot, BOTH)
        job = _number(told, 0)
        q_op = _queries(
            q, table, head_row, q_b, q_h, q_s, table_s, _number(told, 4), _number(told, 5), _number(told, 6), q_tile,
            i_w, D, DIM, GATHER and not FETCHED, ROWS, Q_LAYOUT,
        )  # fmt: skip
        wrong = 0
        if FAST:
            gl.thread_barrier()
            wrong = any_vote(votes)
        if wrong != 0:
            LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
            wrong_jobs.index(done_slot).slice(i_w, 1).store(gl.full([1], 0, gl.int32, LINE) + done_job)
        elif done_job >= 0:
            if GATHER:
                table_here = table + gl.load(head_row + o_h) * table_s
            else:
                table_here = table
            finish(
                acc, inverse_sum(row_sum), q_buf, desc_o, out, table_here, table_s, o_q, o_h, o_b,
                out_b, out_h, out_s, i_w, D, DIM, GATHER, ROWS,
            )  # fmt: skip
            if HAS_LSE:
                put_lse(
                    row_max, row_sum, lse + (o_b * heads + o_h) * table_s, table_here, table_s, o_q * 128 + i_w * 64,
                    True, GATHER,
                )  # fmt: skip
    if not GATHER:
        tma.store_wait(0)


@gluon.jit(do_not_specialize_on_alignment=["lse", "table", "valid", "order", "counter", "again", "merged", "told"],
           do_not_specialize=[
    "sk", "words", "rows", "qb", "kb", "pooled_keys", "heads", "jobs", "in_order", "programs", "table_s",
    "list_b", "list_h", "bits_b", "bits_h", "bias_b", "bias_h",
    "q_b", "q_h", "q_s", "out_b", "out_h", "out_s",
])  # fmt: skip
def block_sparse_pairs_kernel(
    desc_q, desc_k, desc_v, desc_o, desc_pk, desc_pv, q, out, lse, merged, told, order, counter, again,
    table, head_row, bias, bits, valid, scale2, inv_scale, sk, words, rows, qb, kb, pooled_keys, heads, jobs, in_order,
    programs, table_s: int64, q_b: int64, q_h: int64, q_s: int64, out_b: int64, out_h: int64, out_s: int64,
    list_b, list_h, bits_b, bits_h, bias_b, bias_h,
    D: gl.constexpr, DIM: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr, EVEN_K: gl.constexpr,
    HAS_POOLED: gl.constexpr, HAS_VALID: gl.constexpr, GATHER: gl.constexpr, HAS_LSE: gl.constexpr,
    FAST: gl.constexpr, FETCH: gl.constexpr, CONSUMER_REGS: gl.constexpr, PRODUCER_REGS: gl.constexpr,
):  # fmt: skip
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    MORE_BIASED: gl.constexpr = HAS_POOLED or HAS_VALID
    FETCHED: gl.constexpr = GATHER and FETCH
    q_bufs = gl.allocate_shared_memory(desc_k.dtype, [2, 1, 1, 64, D], desc_k.layout)
    k_bufs = gl.allocate_shared_memory(desc_k.dtype, [STAGES, 1, 1, TILE, D], desc_k.layout)
    v_bufs = gl.allocate_shared_memory(desc_k.dtype, [STAGES, 1, 1, TILE, D], desc_k.layout)
    extras = gl.allocate_shared_memory(gl.float32, [STAGES, TILE], FLAT)
    info_0 = gl.allocate_shared_memory(gl.int32, [2, 8], FLAT)
    info_1 = gl.allocate_shared_memory(gl.int32, [2, 8], FLAT)
    # Job numbers of either consumer, in one of two slots in turn, and its votes.
    wrong_jobs = gl.allocate_shared_memory(gl.int32, [2, 2], FLAT)
    votes = gl.allocate_shared_memory(gl.int32, [2], FLAT)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    behind = gl.allocate_shared_memory(gl.int64, [1], BAR)
    mbarrier.init(behind, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(2):
        wrong_jobs.index(i).store(gl.full([2], -1, gl.int32, gl.BlockedLayout([1], [32], [4], [0])))
    fence_async_shared()
    bars = (k_full, v_full, empty)
    shared = (q_bufs, k_bufs, v_bufs, extras, (info_0, info_1), (wrong_jobs, votes), q_full, q_empty, bars)
    tokens = gl.allocate_shared_memory(gl.int32, [64 if FETCHED else 4], FLAT)
    consumer_args = (  # noqa: RUF005
        desc_o, q, out, lse, table, head_row, scale2, heads, table_s, q_b, q_h, q_s, out_b, out_h, out_s,
    ) + shared + (behind,)  # fmt: skip
    producer_args = (  # noqa: RUF005
        desc_q, desc_k, desc_v, desc_pk, desc_pv, merged, told, order, counter, again,
        bias, bits, valid, inv_scale, sk, words, rows, qb, kb, pooled_keys, heads, jobs, in_order, programs,
        list_b, list_h, bits_b, bits_h, bias_b, bias_h,
        q, table, head_row, tokens, table_s, q_b, q_h, q_s,
    ) + shared  # fmt: skip
    gl.warp_specialize(
        [
            (_consumer, (
                consumer_args, 0, D, DIM, TILE, STAGES, MORE_BIASED, GATHER, HAS_LSE, FAST, FETCHED,
            )),
            (_consumer, (
                consumer_args, 1, D, DIM, TILE, STAGES, MORE_BIASED, GATHER, HAS_LSE, FAST, FETCHED,
            )),
            (pairs_producer, (
                producer_args, D, DIM, TILE, STAGES, EVEN_K, HAS_POOLED, HAS_VALID, GATHER, FAST, FETCHED,
            )),
        ],
        [4, 1],
        [CONSUMER_REGS, PRODUCER_REGS],
    )  # fmt: skip


AOT_SPECS = pairs_aot_specs(block_sparse_pairs_kernel)
