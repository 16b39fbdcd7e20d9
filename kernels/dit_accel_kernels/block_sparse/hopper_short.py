"""Gluon kernel for Hopper (sm_90) and short lists: jobs that end where they end, by two consumers that are not in step.

The roles, the ring of tiles and the steps are those of :mod:`.hopper`, which hides the last product with values under the
first softmax of the next job. With four tiles a job that costs more than it hides: both consumers stand at the same
border at once, with them the tensor cores. Here a consumer ends its job before it begins the next, and consumer 1 starts
a job when consumer 0 has turned its first tile into weights, so that one multiplies while the other is at a border
(``behind``). What a job needs is fetched earlier: its first block is known before the last tile of the job before is
asked for.

A job whose sums are out of range is repeated as in :mod:`.hopper`, in a loop of its own; what it has written is written
again. Consumers leave in ``failed`` which rows are wrong, in one of two slots in turn, and count in ``checked``: the
producer waits for that only when it has no other job. Job -1 is the end.

float16, which has too little range, stays with the other kernel, and so does all that may come with the blocks: remainder,
order, padding, windows.
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

from .hopper_short_load import producer
from .hopper_short_specs import short_aot_specs
from .hopper_steps import _shares, fast_step, finish, inverse_sum, next_stage, put_lse, release, step, total

__all__ = ["AOT_SPECS", "block_sparse_short_kernel"]


@gluon.jit
def _number(x, which: gl.constexpr):
    return gl.sum(gl.where(gl.arange(0, 8, layout=x.type.layout) == which, x, 0), 0)


@gluon.jit
def _wait_for_writes():
    """Wait until all output is in memory, where that of a repeated job must come after; ``store_wait`` waits for reads."""
    gl.inline_asm_elementwise(
        "cp.async.bulk.wait_group 0; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _first_tile(q_op, k_bufs, extras, bars, stage, phase, scale2, masked, S_LAYOUT: gl.constexpr, D: gl.constexpr):
    """Weights, maximum and sums of the first tile of a job, under nothing but what the other consumer multiplies."""
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16]), 2)
    mbarrier.wait(bars[0].index(stage), phase)
    s = gl.zeros([64, 128], gl.float32, layout=S_LAYOUT)
    k_tile = k_bufs.index(stage).reshape([128, D]).permute([1, 0])
    s = warpgroup_mma(q_op, k_tile, s, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    if masked != 0:
        s = s + gl.expand_dims(extras.index(stage).load(gl.SliceLayout(0, S_LAYOUT)), 0)
    row_max = gl.maximum(gl.max(s, 1) * scale2, -1.0e30)
    weights = gl.exp2(s * scale2 - gl.expand_dims(row_max, 1))
    shares = _shares(weights)
    return gl.convert_layout(weights.to(k_bufs.dtype), P_LAYOUT), row_max, shares


@gluon.jit
def _jobs(
    args, told, job, q_op, acc, stage, phase, slot, i_w: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    HAS_LSE: gl.constexpr, EVEN_K: gl.constexpr, FAST: gl.constexpr,
):  # fmt: skip
    """All jobs in a row that are not to be repeated, or all that are."""
    (
        desc_o, lse, scale2, heads, table_s,
        q_bufs, k_bufs, v_bufs, extras, info, failed, q_full, q_empty, bars, behind, checked,
    ) = args  # fmt: skip
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    Q_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, S_LAYOUT, 2)
    LINE: gl.constexpr = gl.BlockedLayout([8], [32], [4], [0])
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    q_buf = q_bufs.index(i_w)
    q_tile = q_buf.reshape([64, D])
    while job >= 0:
        masked = _number(told, 7) if EVEN_K else 1
        if i_w == 1:
            mbarrier.wait(behind, slot)
        p, row_max, shares = _first_tile(q_op, k_bufs, extras, bars, stage, phase, scale2, masked, S_LAYOUT, D)
        # The output of the job before has left the buffer of the queries.
        tma.store_wait(0)
        gl.thread_barrier()
        if i_w == 0:
            mbarrier.arrive(behind, count=1)
        mbarrier.arrive(bars[2].index(stage), count=1)
        mbarrier.arrive(q_empty.index(i_w), count=1)
        # Read again: in registers over the first tile it is one too many.
        n = _number(info.index(slot).load(LINE), 2)
        if FAST:
            # No key of this tile counts for the row: the weights of the others are relative to 0.
            row_max = gl.where(row_max == -1.0e30, 0.0, row_max)
        for t in range(n):
            if FAST:
                acc, p, shares, stage, phase = fast_step(
                    acc, p, row_max, shares, q_op, k_bufs, v_bufs, extras, bars, stage, phase, scale2, t > 0,
                    S_LAYOUT, D, STAGES, False,
                )  # fmt: skip
            else:
                acc, p, row_max, shares, stage, phase = step(
                    acc, p, row_max, shares, q_op, k_bufs, v_bufs, extras, bars, stage, phase, scale2, t > 0,
                    S_LAYOUT, D, STAGES, False,
                )  # fmt: skip
        mbarrier.wait(bars[1].index(stage), phase)
        acc = warpgroup_mma(p, v_bufs.index(stage).reshape([128, D]), acc, use_acc=n > 0, is_async=True)
        row_sum = total(shares, S_LAYOUT)
        done = info.index(slot).load(LINE)
        i_q, i_h, i_b = _number(done, 4), _number(done, 5), _number(done, 6)
        if FAST:
            # Weights and their sums within 2^-60 and 2^100: none has overflown, none that matters is lost.
            fine = (row_sum > 8.7e-19) & (row_sum < 1.2e30) | (_number(done, 3) != 0)
            failed.index(slot).slice(i_w * 64, 64).store(gl.where(fine, 0, 1).to(gl.int8))
            release(checked)
        slot ^= 1
        mbarrier.wait(q_full.index(i_w), slot)
        told = info.index(slot).load(LINE)
        q_op = q_tile.load(Q_LAYOUT)
        acc = warpgroup_mma_wait(0, deps=[acc])
        stage, phase = next_stage(stage, phase, STAGES)
        if not FAST:
            _wait_for_writes()
        finish(
            acc, inverse_sum(row_sum), q_buf, desc_o, None, None, table_s, i_q, i_h, i_b, 0, 0, 0, i_w,
            D, D, False, ROWS,
        )  # fmt: skip
        if HAS_LSE:
            put_lse(
                row_max, row_sum, lse + (i_b * heads + i_h) * table_s, None, table_s, i_q * 128 + i_w * 64, True, False,
            )  # fmt: skip
        job = _number(told, 0)
        if FAST:
            job = gl.where(_number(told, 3) > 1, -1, job)
    return told, q_op, acc, stage, phase, slot


@gluon.jit
def _consumer(
    args, i_w: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, HAS_LSE: gl.constexpr, EVEN_K: gl.constexpr
):  # fmt: skip
    q_bufs, info, q_full = args[5], args[9], args[11]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    mbarrier.wait(q_full.index(i_w), 0)
    told = info.index(0).load(gl.BlockedLayout([8], [32], [4], [0]))
    q_op = q_bufs.index(i_w).reshape([64, D]).load(gl.DotOperandLayout(0, S_LAYOUT, 2))
    acc = gl.zeros([64, D], gl.float32, layout=O_LAYOUT)
    none = _number(told, 0) * 0
    told, q_op, acc, stage, phase, slot = _jobs(
        args, told, _number(told, 0), q_op, acc, none, none, none, i_w, D, STAGES, HAS_LSE, EVEN_K, True
    )  # fmt: skip
    _jobs(args, told, _number(told, 0), q_op, acc, stage, phase, slot, i_w, D, STAGES, HAS_LSE, EVEN_K, False)
    tma.store_wait(0)


@gluon.jit(do_not_specialize_on_alignment=["lse", "order", "counter", "again"], do_not_specialize=[
    "sk", "qb", "kb", "heads", "jobs", "in_order", "programs", "alone", "table_s", "list_b", "list_h",
])  # fmt: skip
def block_sparse_short_kernel(
    desc_q, desc_k, desc_v, desc_o, lse, row_start, full, partial, indices, order, counter, again, scale2, sk, qb, kb,
    heads, jobs, in_order, programs, alone, table_s: int64, list_b, list_h,
    D: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, EVEN_K: gl.constexpr, HAS_PARTIAL: gl.constexpr,
    HAS_LSE: gl.constexpr, CLAIM: gl.constexpr,
    CONSUMER_REGS: gl.constexpr, PRODUCER_REGS: gl.constexpr,
):  # fmt: skip
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_bufs = gl.allocate_shared_memory(desc_k.dtype, [2, 1, 1, 64, D], desc_k.layout)
    k_bufs = gl.allocate_shared_memory(desc_k.dtype, [STAGES, 1, 1, 128, D], desc_k.layout)
    v_bufs = gl.allocate_shared_memory(desc_k.dtype, [STAGES, 1, 1, 128, D], desc_k.layout)
    extras = gl.allocate_shared_memory(gl.float32, [STAGES, 128], FLAT)
    info = gl.allocate_shared_memory(gl.int32, [2, 8], FLAT)
    failed = gl.allocate_shared_memory(gl.int8, [2, 128], FLAT)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    behind = gl.allocate_shared_memory(gl.int64, [1], BAR)
    checked = gl.allocate_shared_memory(gl.int64, [1], BAR)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    mbarrier.init(behind, count=1)
    mbarrier.init(checked, count=2)
    failed.index(1).store(gl.full([128], 0, gl.int8, gl.BlockedLayout([1], [32], [4], [0])))
    fence_async_shared()
    bars = (k_full, v_full, empty)
    shared = (q_bufs, k_bufs, v_bufs, extras, info, failed, q_full, q_empty, bars)
    consumer_args = (desc_o, lse, scale2, heads, table_s) + shared + (behind, checked)  # noqa: RUF005
    producer_args = (  # noqa: RUF005
        desc_q, desc_k, desc_v, row_start, full, partial, indices, order, counter, again, sk, qb, kb, heads, jobs,
        in_order, programs, alone, list_b, list_h,
    ) + shared + (checked,)  # fmt: skip
    gl.warp_specialize(
        [
            (_consumer, (consumer_args, 0, D, STAGES, HAS_LSE, EVEN_K)),
            (_consumer, (consumer_args, 1, D, STAGES, HAS_LSE, EVEN_K)),
            (producer, (producer_args, D, BLOCK_K, STAGES, EVEN_K, HAS_PARTIAL, CLAIM)),
        ],
        [4, 1],
        [CONSUMER_REGS, PRODUCER_REGS],
    )


AOT_SPECS = short_aot_specs(block_sparse_short_kernel)
