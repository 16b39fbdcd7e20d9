"""One consumer of the 8-bit Hopper kernel when values stay in 16 bits: its steps and its jobs; see :mod:`.hopper8`."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..block_sparse.hopper_steps import next_stage, release
from .hopper8_finish import finish, logarithm
from .hopper8_weights import (
    declare_flag,
    first_logits,
    halves,
    load_scales,
    logits,
    note_sums,
    shares_of,
    start_logits,
    too_large,
    total,
    weights_of,
    whole,
)

__all__ = ["consumer", "place_of", "told"]


@gluon.jit
def _number(x, which: gl.constexpr):
    return gl.sum(gl.where(gl.arange(0, 8, layout=x.type.layout) == which, x, 0), 0)


@gluon.jit
def told(info, q_full, q_phase):
    """Wait for the next job: its number, -1 at the end and -2 to only finish the one before, its tiles, and its mask."""
    mbarrier.wait(q_full, q_phase)
    x = info.index(q_phase).load(gl.BlockedLayout([8], [32], [4], [0]))
    return _number(x, 0), _number(x, 1), _number(x, 7)


@gluon.jit
def place_of(info, slot):
    """Query block, head and batch element of the job in a slot."""
    x = info.index(slot).load(gl.BlockedLayout([8], [32], [4], [0]))
    return _number(x, 4), _number(x, 5), _number(x, 6)


@gluon.jit
def _start(acc, p, q_op, k_bufs, v_bufs, bars, stage, after, after_phase, S_LAYOUT: gl.constexpr, D: gl.constexpr):
    """Begin both products of a step, to be waited for in this order."""
    mbarrier.wait(bars[0].index(after), after_phase)
    s = start_logits(q_op, k_bufs, after, S_LAYOUT, D)
    acc = warpgroup_mma(p, v_bufs.index(stage).reshape([128, D]), acc, is_async=True)
    return acc, s


@gluon.jit
def _pack(w0, w1, like, S_LAYOUT: gl.constexpr):
    """Weights of both halves as the operand of the product with the values."""
    return gl.convert_layout(whole(w0, w1, S_LAYOUT).to(like.dtype), like.type.layout, assert_trivial=True)


@gluon.jit
def _first_tile(
    acc, p, q_op, q_factor, k_bufs, v_bufs, scales, extras, bars, stage, phase, masked,
    S_LAYOUT: gl.constexpr, HALF: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Weights, base and sums of the first tile of a job, while the last values of the job before are added."""
    after, after_phase = next_stage(stage, phase, STAGES)
    acc, s = _start(acc, p, q_op, k_bufs, v_bufs, bars, stage, after, after_phase, S_LAYOUT, D)
    s = warpgroup_mma_wait(1, deps=[s])
    s0, s1 = halves(s, HALF)
    x0, x1, base = first_logits(s0, s1, q_factor, scales, extras, after, masked, HALF)
    w0, w1 = gl.exp2(x0 - gl.expand_dims(base, 1)), gl.exp2(x1 - gl.expand_dims(base, 1))
    shares = shares_of(w0) + shares_of(w1)
    new_p = _pack(w0, w1, p, S_LAYOUT)
    acc, p, new_p = warpgroup_mma_wait(0, deps=[acc, p, new_p])
    release(bars[1].index(after))
    return acc, new_p, base, shares, after, after_phase


@gluon.jit
def _step(
    acc, p, base, shares, q_op, q_factor, k_bufs, v_bufs, scales, bars, stage, phase, limit,
    S_LAYOUT: gl.constexpr, HALF: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, I_W: gl.constexpr,
):  # fmt: skip
    """Add the values of the tile at ``(stage, phase)`` and turn the logits of the next one into weights."""
    after, after_phase = next_stage(stage, phase, STAGES)
    acc, s = _start(acc, p, q_op, k_bufs, v_bufs, bars, stage, after, after_phase, S_LAYOUT, D)
    scale0, scale1 = load_scales(scales, after)
    s = warpgroup_mma_wait(1, deps=[s])
    f0, f1 = q_factor * scale0, q_factor * scale1
    s0, s1 = halves(s, HALF)
    w0, w1 = weights_of(s0, f0, base), weights_of(s1, f1, base)
    new_p = _pack(w0, w1, p, S_LAYOUT)
    sums = note_sums(shares_of(w0) + shares_of(w1), limit, I_W)
    bad = too_large(stage, I_W)
    acc, p, new_p = warpgroup_mma_wait(0, deps=[acc, p, new_p])
    release(bars[1].index(after))
    if bad != 0:
        x0, x1 = logits(s0, f0), logits(s1, f1)
        new_base = gl.maximum(base, gl.maximum(gl.max(x0, 1), gl.max(x1, 1)))
        shrink = gl.exp2(base - new_base)
        base = new_base
        w0, w1 = gl.exp2(x0 - gl.expand_dims(base, 1)), gl.exp2(x1 - gl.expand_dims(base, 1))
        sums = shares_of(w0) + shares_of(w1)
        new_p = _pack(w0, w1, p, S_LAYOUT)
        shares = shares * gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, shares.type.layout)), 1)
        acc = acc * gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout)), 1)
    return acc, new_p, base, shares + sums, after, after_phase


@gluon.jit
def consumer(
    args, I_W: gl.constexpr, D: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr, GATHER: gl.constexpr,
    HAS_LSE: gl.constexpr,
):  # fmt: skip
    """Do 64 rows of each job of the program; values are bfloat16."""
    (
        desc_o, out, lse, v_scale, table, head_row, scale2, limit, _zero, heads, sq, out_b, out_h, out_s,
        q_bufs, q_own, q_scales, o_bufs, k_bufs, v_bufs, scales, extras, info, q_full, q_empty, bars,
    ) = args  # fmt: skip
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    HALF: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, HALF)
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    q_tile = q_bufs.index(I_W).reshape([64, D])
    own = q_own.index(I_W).reshape([64, D])
    COPY: gl.constexpr = gl.BlockedLayout([1, 16], [512 // D, D // 16], [4, 1], [1, 0])
    row_scales = q_scales.slice(I_W * 64, 64)
    # As if a job without a number had come before: its weights are 0, its values are what the memory holds.
    stage, phase, q_phase, done = STAGES - 1, 1, 0, -2
    acc = gl.zeros([64, D], gl.float32, layout=O_LAYOUT)
    p = gl.zeros([64, 128], v_bufs.dtype, layout=gl.DotOperandLayout(0, O_LAYOUT, 2))
    done_base = gl.zeros([64], gl.float32, layout=ROW)
    done_sum = done_base
    job, tiles, masked = told(info, q_full.index(I_W), q_phase)
    job = declare_flag(job, I_W)
    while job != -1:
        # The buffer in which the queries come is soon that of the next job.
        own.store(q_tile.load(COPY))
        fence_async_shared()
        q_factor = row_scales.load(ROW) * scale2
        o_q, o_h, o_b = place_of(info, q_phase ^ 1)
        release(q_empty.index(I_W))
        acc, p, base, shares, stage, phase = _first_tile(
            acc, p, own, q_factor, k_bufs, v_bufs, scales, extras, bars, stage, phase, masked, S_LAYOUT, HALF, D, STAGES
        )
        if done >= 0:
            finish(
                acc, done_sum, done_base + logarithm(done_sum), o_bufs.index(I_W), desc_o, out, lse, v_scale, table,
                head_row, sq, o_q, o_h, o_b, heads, out_b * 8, out_h * 8, out_s * 8, I_W, D, DIM, GATHER, HAS_LSE,
                False, ROWS,
            )  # fmt: skip
        acc = gl.zeros([64, D], gl.float32, layout=O_LAYOUT)
        for _t in range(tiles - 1):
            acc, p, base, shares, stage, phase = _step(
                acc, p, base, shares, own, q_factor, k_bufs, v_bufs, scales, bars, stage, phase, limit,
                S_LAYOUT, HALF, D, STAGES, I_W,
            )  # fmt: skip
        done, done_base, done_sum = job, base, total(shares, HALF)
        q_phase ^= 1
        job, tiles, masked = told(info, q_full.index(I_W), q_phase)
