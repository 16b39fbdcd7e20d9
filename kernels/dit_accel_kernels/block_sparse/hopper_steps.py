"""What one consumer warpgroup of the Hopper kernel does with one tile, and around a job; see :mod:`.hopper`."""

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

from .hopper_windows import hide, row_bits

__all__ = [
    "any_vote",
    "eight",
    "fast_step",
    "finish",
    "first_start",
    "first_tile",
    "gather_rows",
    "inverse_sum",
    "next_stage",
    "on_the_spot",
    "put_lse",
    "release_queries",
    "split_job",
    "step",
    "total",
    "vote",
]


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    """The ring position after ``(stage, phase)``."""
    if STAGES == 1:
        return stage, phase ^ 1
    wrap = stage == STAGES - 1
    return gl.where(wrap, 0, stage + 1), gl.where(wrap, phase ^ 1, phase)


@gluon.jit
def split_job(job, qb, heads):
    """Query block, head and batch element of a job; neighbours share a head, whose keys stay in L2."""
    rest = job // qb
    return job - rest * qb, rest % heads, rest // heads


@gluon.jit
def on_the_spot(x):
    """``x``, of 32 bits; what follows from it is computed here, not ahead of loops over which it would be kept."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=1)


@gluon.jit
def eight(x):
    """``8 * x``, a 64-bit stride, multiplied where it is used: LLVM would do it at the entry and keep the result."""
    return gl.inline_asm_elementwise("mov.b64 $0, $1;", "=l,l", [x], dtype=gl.int64, is_pure=False, pack=1) * 8


@gluon.jit
def release(bar):
    """Say that all threads of this warpgroup have done with a buffer."""
    gl.thread_barrier()
    mbarrier.arrive(bar, count=1)


@gluon.jit
def release_queries(q_empty, GATHER: gl.constexpr):
    """Give the buffer of the queries back once the output has left it."""
    if not GATHER:
        tma.store_wait(0)
    release(q_empty)


@gluon.jit
def _shares(weights):
    """Sums of the four shares of each row that different lanes hold, ``[64, 4]``: lanes add up once a job."""
    return gl.sum(gl.sum(weights.reshape([64, 16, 4, 2]), 3), 1)


@gluon.jit
def total(shares, S_LAYOUT: gl.constexpr):
    """Sums of the rows from those of their shares."""
    return gl.convert_layout(gl.sum(shares, 1), gl.SliceLayout(1, S_LAYOUT))


@gluon.jit
def _start_logits(
    q_op, k_bufs, extras, bars, stage, phase, S_LAYOUT: gl.constexpr, D: gl.constexpr, BIASED: gl.constexpr
):
    """Begin the product with the keys at ``(stage, phase)``, on top of what is to be added."""
    mbarrier.wait(bars[0].index(stage), phase)
    k_tile = k_bufs.index(stage).reshape([128, D]).permute([1, 0])
    if BIASED:
        extra = extras.index(stage).load(gl.SliceLayout(0, S_LAYOUT))
        s = gl.expand_dims(extra, 0) + gl.zeros([64, 128], gl.float32, layout=S_LAYOUT)
        return warpgroup_mma(q_op, k_tile, s, is_async=True)
    else:
        s = gl.zeros([64, 128], gl.float32, layout=S_LAYOUT)
        return warpgroup_mma(q_op, k_tile, s, use_acc=False, is_async=True)


@gluon.jit
def _logits(s, extras, stage, S_LAYOUT: gl.constexpr, BIAS: gl.constexpr):
    """Wait for the product with the keys, and add or hide what has not been added before it.

    ``BIAS`` says how biased tiles are: 0 begins the product with what is to be added, -1 adds it afterwards, 1 and 2 hide
    what is outside of the windows of tiles of one and two blocks.
    """
    if BIAS == 0:
        return warpgroup_mma_wait(1, deps=[s])
    elif BIAS == -1:
        s = warpgroup_mma_wait(1, deps=[s])
        return s + gl.expand_dims(extras.index(stage).load(gl.SliceLayout(0, S_LAYOUT)), 0)
    else:
        rows = row_bits(extras, stage)
        s = warpgroup_mma_wait(1, deps=[s])
        return hide(s, extras, stage, rows, S_LAYOUT, BIAS)


@gluon.jit
def _start_values(acc, p, v_bufs, bars, stage, phase, more, D: gl.constexpr):
    """Begin the product with the values at ``(stage, phase)``, on top of ``acc`` if there is ``more`` in it."""
    mbarrier.wait(bars[1].index(stage), phase)
    return warpgroup_mma(p, v_bufs.index(stage).reshape([128, D]), acc, use_acc=more, is_async=True)


@gluon.jit
def _wait_values(acc, p, new_p, shares):
    """Wait for the product with the values, not before the exponentials of the new weights are under way.

    ptxas would move this wait up to that for the logits, or exponentials behind it, so that nothing ran under the product.
    It moves neither across a branch that depends on the sums of the weights. Nobody sleeps, unless the job fails anyway;
    ptxas would know that sums of exponentials are not negative. The new weights pass through the wait to keep LLVM from
    moving them.
    """
    shares = gl.inline_asm_elementwise(
        """{
        .reg .pred odd; .reg .f32 sum;
        add.f32 sum, $2, $3; setp.gt.f32 odd, sum, 0f7E967699;
        @odd nanosleep.u32 1;
        mov.f32 $0, $2; mov.f32 $1, $3;
        }""",
        "=f,=f,f,f", [shares], dtype=gl.float32, is_pure=False, pack=2,
    )  # fmt: skip
    acc, p, new_p = warpgroup_mma_wait(0, deps=[acc, p, new_p])
    return acc, p, new_p, shares


def _all_at_once() -> str:
    """Assembly that passes 32 registers on and, for all that ptxas knows, needs their exclusive or before."""
    passed = " ".join(f"mov.b32 ${i}, ${i + 32};" for i in range(32))
    folded = " ".join(f"lop3.b32 all, all, ${i + 32}, ${i + 33}, 0x96;" for i in range(0, 32, 2))
    return (
        f"{{ .reg .b32 all; .reg .pred odd; mov.b32 all, 0; {folded} "
        f"setp.eq.u32 odd, all, 0x7f81ff81; @odd nanosleep.u32 1; {passed} }}"
    )


_ALL_AT_ONCE = gl.constexpr(_all_at_once())
_REGISTERS = gl.constexpr(",".join(["=r"] * 32 + ["r"] * 32))


@gluon.jit
def _packed(p):
    """``p [64, 128]`` in 32 registers a thread from here on.

    Otherwise ptxas keeps the weights in 64 while the output of the job before is written, and rounds them afterwards.
    """
    return gl.inline_asm_elementwise(_ALL_AT_ONCE, _REGISTERS, [p], dtype=p.dtype, is_pure=False, pack=64)


@gluon.jit
def first_start(
    acc, p, q_op, k_bufs, v_bufs, extras, bars, stage, phase, more,
    S_LAYOUT: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, BIAS: gl.constexpr = 0,
):  # fmt: skip
    """Begin the product with the first keys of a job and that with the last values of the job before."""
    after, after_phase = next_stage(stage, phase, STAGES)
    s = _start_logits(q_op, k_bufs, extras, bars, after, after_phase, S_LAYOUT, D, BIAS == 0)
    acc = _start_values(acc, p, v_bufs, bars, stage, phase, more, D)
    return acc, s, after, after_phase


@gluon.jit
def first_tile(
    acc, p, s, extras, bars, stage, scale2, masked, S_LAYOUT: gl.constexpr, FAST: gl.constexpr, BIAS: gl.constexpr = 0,
):  # fmt: skip
    """Weights, maximum and sums of the first tile of a job, while the last values of the job before are added."""
    if BIAS == -1:
        s = warpgroup_mma_wait(1, deps=[s])
        if masked != 0:
            s = s + gl.expand_dims(extras.index(stage).load(gl.SliceLayout(0, S_LAYOUT)), 0)
    else:
        s = _logits(s, extras, stage, S_LAYOUT, BIAS)
    row_max = gl.maximum(gl.max(s, 1) * scale2, -1.0e30)
    weights = gl.exp2(s * scale2 - gl.expand_dims(row_max, 1))
    shares = _shares(weights)
    new_p = gl.convert_layout(weights.to(p.dtype), p.type.layout)
    acc, p, new_p, shares = _wait_values(acc, p, new_p, shares)
    if acc.shape[1] == 128:
        new_p = _packed(new_p)
    release(bars[2].index(stage))
    if FAST:
        # No key of this tile counts for the row: the weights of the others are relative to 0.
        row_max = gl.where(row_max == -1.0e30, 0.0, row_max)
    return acc, new_p, row_max, shares


@gluon.jit
def fast_step(
    acc, p, row_max, shares, q_op, k_bufs, v_bufs, extras, bars, stage, phase, scale2, more,
    S_LAYOUT: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, BIASED: gl.constexpr,
    BIAS: gl.constexpr = 0,
):  # fmt: skip
    """Like :func:`step`, but weights stay relative to ``row_max``: no maximum, nothing to rescale."""
    after, after_phase = next_stage(stage, phase, STAGES)
    s = _start_logits(q_op, k_bufs, extras, bars, after, after_phase, S_LAYOUT, D, BIASED and BIAS == 0)
    acc = _start_values(acc, p, v_bufs, bars, stage, phase, more, D)
    s = _logits(s, extras, after, S_LAYOUT, BIAS if BIASED else 0)
    weights = gl.exp2(s * scale2 - gl.expand_dims(row_max, 1))
    shares += _shares(weights)
    new_p = gl.convert_layout(weights.to(p.dtype), p.type.layout)
    acc, p, new_p, shares = _wait_values(acc, p, new_p, shares)
    release(bars[2].index(after))
    return acc, new_p, shares, after, after_phase


@gluon.jit
def step(
    acc, p, row_max, shares, q_op, k_bufs, v_bufs, extras, bars, stage, phase, scale2, more,
    S_LAYOUT: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, BIASED: gl.constexpr,
    BIAS: gl.constexpr = 0,
):  # fmt: skip
    """Add the values of the tile at ``(stage, phase)`` and turn the logits of the next one into weights."""
    after, after_phase = next_stage(stage, phase, STAGES)
    s = _start_logits(q_op, k_bufs, extras, bars, after, after_phase, S_LAYOUT, D, BIASED and BIAS == 0)
    acc = _start_values(acc, p, v_bufs, bars, stage, phase, more, D)
    s = _logits(s, extras, after, S_LAYOUT, BIAS if BIASED else 0)
    new_max = gl.maximum(row_max, gl.max(s, 1) * scale2)
    weights = gl.exp2(s * scale2 - gl.expand_dims(new_max, 1))
    shrink = gl.exp2(row_max - new_max)
    SHARES: gl.constexpr = gl.SliceLayout(1, shares.type.layout)
    shares = shares * gl.expand_dims(gl.convert_layout(shrink, SHARES), 1) + _shares(weights)
    new_p = gl.convert_layout(weights.to(p.dtype), p.type.layout)
    acc, p, new_p, shares = _wait_values(acc, p, new_p, shares)
    release(bars[2].index(after))
    acc = acc * gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout)), 1)
    return acc, new_p, new_max, shares, after, after_phase


@gluon.jit
def gather_rows(x, table, x_s, table_s, start, q_tile, D: gl.constexpr, DIM: gl.constexpr, ROWS: gl.constexpr):
    """Copy 64 query rows from position ``start`` of block order into a shared buffer."""
    o_m = start + gl.arange(0, 64, layout=gl.SliceLayout(1, ROWS))
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, ROWS))
    valid = o_m.to(gl.int64) < table_s
    token = gl.load(table + o_m, mask=valid, other=0).to(gl.int64)
    there = gl.expand_dims(valid, 1)
    if DIM < D:
        there = there & gl.expand_dims(o_d < DIM, 0)
    rows = gl.load(x + gl.expand_dims(token * x_s, 1) + gl.expand_dims(o_d, 0), mask=there, other=0.0)
    gl.thread_barrier()
    q_tile.store(rows)
    gl.thread_barrier()


@gluon.jit
def _end(table_s, start):
    """Behind the last of 64 rows from ``start`` on that there is."""
    return start + gl.minimum(table_s - start, 64).to(gl.int32)


@gluon.jit
def finish(
    acc, inverse, q_buf, desc_o, out, table, table_s, i_q, i_h, i_b, out_b, out_h, out_s, i_w,
    D: gl.constexpr, DIM: gl.constexpr, GATHER: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """Normalise and write 64 rows of the output through the buffer of the queries.

    Without an order the buffer is still being read afterwards, until ``tma.store_wait(0)``.
    """
    q_tile = q_buf.reshape([64, D])
    inverse = gl.convert_layout(inverse, gl.SliceLayout(1, acc.type.layout))
    start = i_q * 128 + i_w * 64
    q_tile.store((acc * gl.expand_dims(inverse, 1)).to(q_tile.dtype))
    if GATHER:
        gl.thread_barrier()
        o_m = start + gl.arange(0, 64, layout=gl.SliceLayout(1, ROWS))
        o_d = gl.arange(0, D, layout=gl.SliceLayout(0, ROWS))
        here = o_m < _end(table_s, start)
        there = gl.expand_dims(here, 1)
        if DIM < D:
            there = there & gl.expand_dims(o_d < DIM, 0)
        token = gl.load(table + o_m, mask=here, other=0).to(gl.int64)
        p_out = out + i_b.to(gl.int64) * eight(out_b) + i_h.to(gl.int64) * eight(out_h)
        p_out = p_out + gl.expand_dims(token * eight(out_s), 1) + gl.expand_dims(o_d, 0)
        gl.store(p_out, q_tile.load(ROWS), mask=there)
    else:
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(desc_o, [i_b, i_h, start, 0], q_buf)


@gluon.jit
def _approximate(NAME: gl.constexpr, x):
    """``rcp`` or ``lg2`` of normal numbers, to one or two units in the last place, in one instruction."""
    return gl.inline_asm_elementwise(
        NAME + ".approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def inverse_sum(row_sum):
    """What normalises rows with these sums of weights."""
    empty = row_sum == 0.0
    return gl.where(empty, 0.0, _approximate("rcp", gl.where(empty, 1.0, row_sum)))


@gluon.jit
def vote(votes, wrong):
    """Leave in ``votes``, a word, for each warp whether any of its 16 rows is ``wrong``, ``[64]``.

    A reduction over all rows would do the same with two barriers of its own and addresses that are kept over all loops.
    """
    four = votes._reinterpret(gl.int8, [4], votes.layout)
    four.store(gl.max(wrong.reshape([4, 16]), 1).to(gl.int8))


@gluon.jit
def any_vote(votes):
    """Not 0 if any warp has voted so; a barrier of the warpgroup must lie between."""
    return gl.max(votes.load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def put_lse(row_max, row_sum, lse, table, table_s, start, there, GATHER: gl.constexpr):
    """Write the log-sum-exp of 64 rows if they are ``there``."""
    empty = row_sum == 0.0
    o_m = start + gl.arange(0, 64, layout=row_sum.type.layout)
    log = row_max + _approximate("lg2", gl.where(empty, 1.0, row_sum))
    there = (o_m < _end(table_s, start)) & there
    token = o_m
    if GATHER:
        token = gl.load(table + o_m, mask=there, other=0).to(gl.int64)
    gl.store(lse + token, gl.where(empty, float("-inf"), log * 0.6931471805599453), mask=there)
