"""Gluon kernel for Hopper (sm_90): a producer warp fetches tiles by TMA, two warpgroups multiply 64 query rows each.

A *job* is one block of 128 queries of one head. Its *tiles* of 128 keys are, in this order, all pooled keys if a
remainder is kept and the blocks of its list from the last to the first, so that the one block that can be ragged, and the
one entry that can lack a partner, are in the first tile of the list. A program does many jobs; the producer takes them
from a counter, all in their order but for the last ones, which come longest first. Roles meet at barriers only:

- ``k_full[s]``, ``v_full[s]``: stage ``s`` of the ring was filled by TMA. A position of the ring is a counter over all
  tiles of all jobs of a program, kept as a stage and a phase; keys and values of a tile have the same.
- ``empty[s]``: both consumers have turned the keys of the tile in stage ``s`` into weights and have added the values of
  the tile before it; so the values of a tile are given back one tile after its keys.
- ``q_full[w]``: the queries of consumer ``w`` are in its buffer and ``info`` says what its next job is, in one of two slots
  in turn: when a job is finished, that of the next one has begun. The consumer moves the queries to
  registers while it ends the job before, whose output then leaves through the same buffer, and arrives at ``q_empty[w]``.

Consumers issue the product with the next keys before that with the values of the tile before, and the exponentials of a
tile run under the latter, across the border of two jobs too. Weights are relative to the maximum of the first tile: no
later maximum is taken and nothing is rescaled (``fast_step``). This is exact as long as no weight leaves the range of its
type, which the sum of a row tells: if it is out of bounds, nothing is written and the job is repeated after all others by
the usual online softmax (``step``). float16 has too little range and always takes the latter.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.language import int64

from .hopper_load import producer
from .hopper_specs import aot_specs
from .hopper_steps import (
    any_vote,
    eight,
    fast_step,
    finish,
    first_start,
    first_tile,
    gather_rows,
    inverse_sum,
    on_the_spot,
    put_lse,
    release_queries,
    step,
    total,
    vote,
)
from .hopper_windows import bounds

__all__ = ["AOT_SPECS", "block_sparse_hopper_kernel"]


@gluon.jit
def _number(x, which: gl.constexpr):
    return gl.sum(gl.where(gl.arange(0, 8, layout=x.type.layout) == which, x, 0), 0)


@gluon.jit
def _read(info, slot, BOTH: gl.constexpr):
    """What the producer has written about a job: see :func:`.hopper_load.describe`.

    At head size 64 both slots are read: with an address that depends on the slot ptxas packs weights behind the wait for
    the product with the values, and a step takes 15 to 20 % longer.
    """
    LINE: gl.constexpr = gl.BlockedLayout([8], [32], [4], [0])
    if BOTH:
        return gl.where(slot == 0, info.index(0).load(LINE), info.index(1).load(LINE))
    return info.index(slot).load(LINE)


@gluon.jit
def _queries(
    q, table, head_row, q_b, q_h, q_s, table_s, i_q, i_h, i_b, q_tile, i_w,
    D: gl.constexpr, DIM: gl.constexpr, GATHER: gl.constexpr, ROWS: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """The queries of a job in registers. Strides come in units of 8 elements, so that 16 bytes are read at once."""
    if GATHER:
        q += i_b.to(gl.int64) * eight(q_b) + i_h.to(gl.int64) * eight(q_h)
        table += gl.load(head_row + i_h) * table_s
        gather_rows(q, table, eight(q_s), table_s, i_q * 128 + i_w * 64, q_tile, D, DIM, ROWS)
    return q_tile.load(LAYOUT)


@gluon.jit
def _consumer(
    args, i_w: gl.constexpr, D: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr, MORE_BIASED: gl.constexpr,
    GATHER: gl.constexpr, HAS_LSE: gl.constexpr, FAST: gl.constexpr, BIAS: gl.constexpr = 0,
    FETCHED: gl.constexpr = False, RELEASE: gl.constexpr = 1,
):  # fmt: skip
    (
        desc_o, q, out, lse, table, head_row, scale2, heads, table_s, q_b, q_h, q_s, out_b, out_h, out_s,
        q_bufs, k_bufs, v_bufs, extras, info, failed, q_full, q_empty, bars,
    ) = args  # fmt: skip
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    Q_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, S_LAYOUT, 2)
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    # Whether ``acc`` is set to 0 between jobs; otherwise the first product with values does not add to what is in it:
    # ``more`` says whether the last one of a job is not its first.
    ZERO: gl.constexpr = D == 64
    q_buf = q_bufs.index(i_w)
    # Whether addresses in the buffer of the queries are computed where they are used, not kept over the loops.
    SPARE: gl.constexpr = BIAS > 0 and D == 128
    # As if a job without a number had come before, which ``info`` says: its weights are 0, its values are what the memory
    # holds.
    stage, phase, slot = STAGES - 1, 1, 0
    more = True if D == 64 else gl.to_tensor(False)
    votes = failed.slice(2 + i_w, 1)
    acc = gl.zeros([64, D], gl.float32, layout=O_LAYOUT)
    p = gl.zeros([64, 128], k_bufs.dtype, layout=P_LAYOUT)
    row_max = gl.zeros([64], gl.float32, layout=gl.SliceLayout(1, S_LAYOUT))
    done_sum = row_max
    mbarrier.wait(q_full.index(i_w), 0)
    told = _read(info, 0, D == 64)
    job = _number(told, 0)
    while job != -1:
        i_q, i_h, i_b = _number(told, 4), _number(told, 5), _number(told, 6)
        q_here = q_buf
        if SPARE:
            q_here = q_bufs.index(on_the_spot(job * 0 + i_w))
        q_op = _queries(
            q, table, head_row, q_b, q_h, q_s, table_s, i_q, i_h, i_b, q_here.reshape([64, D]), i_w,
            D, DIM, GATHER and not FETCHED, ROWS, Q_LAYOUT,
        )  # fmt: skip
        if BIAS > 0:
            bits, bases, q_lo, q_hi = extras
            lo, hi = bounds(q_lo, q_hi, i_q, i_w, table_s, BIAS)
            bias = (bits, bases, lo, hi)
        else:
            bias = extras
        acc, s, stage, phase = first_start(
            acc, p, q_op, k_bufs, v_bufs, bias, bars, stage, phase, more, S_LAYOUT, D, STAGES, BIAS,
        )  # fmt: skip
        done = _read(info, slot ^ 1, D == 64)
        # While the two products run: whether the job before came out right.
        wrong = 0
        if FAST:
            # Weights and their sums within 2^-60 and 2^100: none has overflown, none that matters is lost.
            fine = (done_sum > 8.7e-19) & (done_sum < 1.2e30)
            vote(votes, gl.where(fine | (_number(done, 3) != 0), 0, 1))
        done_max = row_max
        acc, p, row_max, shares = first_tile(
            acc, p, s, bias, bars, stage, scale2, 1 if MORE_BIASED else _number(told, 7), S_LAYOUT, FAST, BIAS
        )
        # Read again, like what was told below: registers are short while both products run.
        done = _read(info, slot ^ 1, D == 64)
        done_job, o_q, o_h, o_b = _number(done, 0), _number(done, 4), _number(done, 5), _number(done, 6)
        if FAST:
            wrong = any_vote(votes)
        if wrong != 0:
            LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
            failed.slice(i_w, 1).store(gl.full([1], 0, gl.int32, LINE) + done_job)
        elif done_job >= 0:
            if GATHER:
                table_here = table + gl.load(head_row + o_h) * table_s
            else:
                table_here = table
            q_here = q_buf
            if SPARE:
                q_here = q_bufs.index(on_the_spot(done_job * 0 + i_w))
            finish(
                acc, inverse_sum(done_sum), q_here, desc_o, out, table_here, table_s, o_q, o_h, o_b,
                out_b, out_h, out_s, i_w, D, DIM, GATHER, ROWS,
            )  # fmt: skip
            if HAS_LSE:
                put_lse(
                    done_max, done_sum, lse + (o_b * heads + o_h) * table_s, table_here, table_s, o_q * 128 + i_w * 64,
                    True, GATHER,
                )  # fmt: skip
        told = _read(info, slot, D == 64)
        n_biased, n_plain, careful = _number(told, 1), _number(told, 2), _number(told, 3)
        if ZERO:
            acc = gl.zeros([64, D], gl.float32, layout=O_LAYOUT)
        if not FAST:
            careful = 1
        # The buffer of the queries is given back after more tiles: nobody waits for the output to leave it.
        n_biased -= 1
        if n_biased + n_plain < 1 + RELEASE:
            release_queries(q_empty.index(i_w), GATHER)
        if FAST:
            if MORE_BIASED:
                for t in range(gl.where(careful == 0, n_biased, 0)):
                    acc, p, shares, stage, phase = fast_step(
                        acc, p, row_max, shares, q_op, k_bufs, v_bufs, bias, bars, stage, phase, scale2,
                        True if ZERO else t > 0, S_LAYOUT, D, STAGES, True, BIAS,
                    )  # fmt: skip
                    if t == RELEASE:
                        release_queries(q_empty.index(i_w), GATHER)
            for t in range(gl.where(careful == 0, n_plain, 0)):
                acc, p, shares, stage, phase = fast_step(
                    acc, p, row_max, shares, q_op, k_bufs, v_bufs, bias, bars, stage, phase, scale2,
                    True if ZERO else t + n_biased > 0, S_LAYOUT, D, STAGES, False, BIAS,
                )  # fmt: skip
                if t + n_biased == RELEASE:
                    release_queries(q_empty.index(i_w), GATHER)
        if MORE_BIASED:
            for t in range(gl.where(careful != 0, n_biased, 0)):
                acc, p, row_max, shares, stage, phase = step(
                    acc, p, row_max, shares, q_op, k_bufs, v_bufs, bias, bars, stage, phase, scale2,
                    True if ZERO else t > 0, S_LAYOUT, D, STAGES, True, BIAS,
                )  # fmt: skip
                if t == RELEASE:
                    release_queries(q_empty.index(i_w), GATHER)
        for t in range(gl.where(careful != 0, n_plain, 0)):
            acc, p, row_max, shares, stage, phase = step(
                acc, p, row_max, shares, q_op, k_bufs, v_bufs, bias, bars, stage, phase, scale2,
                True if ZERO else t + n_biased > 0, S_LAYOUT, D, STAGES, False, BIAS,
            )  # fmt: skip
            if t + n_biased == RELEASE:
                release_queries(q_empty.index(i_w), GATHER)
        if not ZERO:
            more = n_biased + n_plain > 0
        done_sum = total(shares, S_LAYOUT)
        slot ^= 1
        mbarrier.wait(q_full.index(i_w), slot)
        told = _read(info, slot, D == 64)
        job = _number(told, 0)
    # The last job was one without a number: nothing of it may be on its way when the program ends.
    mbarrier.wait(bars[1].index(stage), phase)


@gluon.jit(do_not_specialize_on_alignment=["lse", "table", "valid", "order", "counter", "again"], do_not_specialize=[
    "sk", "words", "qb", "kb", "heads", "jobs", "in_order", "programs", "alone", "table_s",
    "list_b", "list_h", "bits_b", "bits_h", "bias_b", "bias_h",
    "q_b", "q_h", "q_s", "out_b", "out_h", "out_s",
])  # fmt: skip
def block_sparse_hopper_kernel(
    desc_q, desc_k, desc_v, desc_o, desc_pk, desc_pv, q, out, lse, row_start, full, partial, indices, order, counter,
    again, table, head_row, bias, bits, valid, scale2, inv_scale, sk, words, qb, kb, heads, jobs, in_order, programs,
    alone, table_s: int64, q_b: int64, q_h: int64, q_s: int64, out_b: int64, out_h: int64, out_s: int64,
    list_b, list_h, bits_b, bits_h, bias_b, bias_h, q_lo, q_hi, k_bits, k_base,
    D: gl.constexpr, DIM: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, EVEN_K: gl.constexpr,
    HAS_PARTIAL: gl.constexpr, HAS_POOLED: gl.constexpr, HAS_VALID: gl.constexpr, GATHER: gl.constexpr,
    HAS_LSE: gl.constexpr, HAS_WINDOWS: gl.constexpr, FAST: gl.constexpr,
    FETCH: gl.constexpr, LATE_BIAS: gl.constexpr, CONSUMER_REGS: gl.constexpr, PRODUCER_REGS: gl.constexpr,
    RELEASE: gl.constexpr = 1,
):  # fmt: skip
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    MORE_BIASED: gl.constexpr = HAS_POOLED or HAS_VALID or HAS_WINDOWS
    WINDOWS: gl.constexpr = 128 // BLOCK_K if HAS_WINDOWS else 0
    BIAS: gl.constexpr = WINDOWS if HAS_WINDOWS else (-1 if LATE_BIAS else 0)
    FETCHED: gl.constexpr = GATHER and FETCH
    q_bufs = gl.allocate_shared_memory(desc_k.dtype, [2, 1, 1, 64, D], desc_k.layout)
    k_bufs = gl.allocate_shared_memory(desc_k.dtype, [STAGES, 1, 1, 128, D], desc_k.layout)
    v_bufs = gl.allocate_shared_memory(desc_k.dtype, [STAGES, 1, 1, 128, D], desc_k.layout)
    if HAS_WINDOWS:
        key_bits = gl.allocate_shared_memory(gl.int32, [STAGES, 128], FLAT)
        bases = gl.allocate_shared_memory(gl.int32, [STAGES, 2], FLAT)
        extras = (key_bits, bases, q_lo, q_hi)
    else:
        extras = gl.allocate_shared_memory(gl.float32, [STAGES, 128], FLAT)
    info = gl.allocate_shared_memory(gl.int32, [2, 8], FLAT)
    # Job numbers of either consumer, and its votes.
    failed = gl.allocate_shared_memory(gl.int32, [4], FLAT)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    info.index(1).store(gl.full([8], -2, gl.int32, gl.BlockedLayout([1], [32], [4], [0])))
    failed.slice(0, 2).store(gl.full([2], -1, gl.int32, gl.BlockedLayout([1], [32], [4], [0])))
    fence_async_shared()
    bars = (k_full, v_full, empty)
    shared = (q_bufs, k_bufs, v_bufs, extras, info, failed, q_full, q_empty, bars)
    tokens = gl.allocate_shared_memory(gl.int32, [64 if FETCHED else 4], FLAT)
    consumer_args = (  # noqa: RUF005
        desc_o, q, out, lse, table, head_row, scale2, heads, table_s, q_b, q_h, q_s, out_b, out_h, out_s,
    ) + shared  # fmt: skip
    producer_args = (  # noqa: RUF005
        desc_q, desc_k, desc_v, desc_pk, desc_pv, row_start, full, partial, indices, order, counter, again,
        bias, bits, valid, inv_scale, sk, words, qb, kb, heads, jobs, in_order, programs, alone,
        list_b, list_h, bits_b, bits_h, bias_b, bias_h, k_bits, k_base,
        q, table, head_row, tokens, table_s, q_b, q_h, q_s,
    ) + shared  # fmt: skip
    gl.warp_specialize(
        [
            (_consumer, (consumer_args, 0, D, DIM, STAGES, MORE_BIASED, GATHER, HAS_LSE, FAST, BIAS, FETCHED, RELEASE)),
            (_consumer, (consumer_args, 1, D, DIM, STAGES, MORE_BIASED, GATHER, HAS_LSE, FAST, BIAS, FETCHED, RELEASE)),
            (producer, (
                producer_args, D, DIM, BLOCK_K, STAGES, EVEN_K, HAS_PARTIAL, HAS_POOLED, HAS_VALID, GATHER, FAST,
                WINDOWS, FETCHED, RELEASE,
            )),
        ],
        [4, 1],
        [CONSUMER_REGS, PRODUCER_REGS],
    )  # fmt: skip


AOT_SPECS = aot_specs(block_sparse_hopper_kernel)
