"""One consumer of the 8-bit Hopper kernel with e4m3 weights and values: its steps and its jobs; see :mod:`.hopper8`.

Sums of e4m3 products are kept with about 14 bits in the tensor cores, so that what is added to a sum that has grown is
lost: with values of 1 and 32768 equal weights 71 % of the output was gone. So the product of each tile is summed up on its
own and added to float32 registers. It is done 64 channels at a time, which are 32 registers.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from ..block_sparse.hopper_steps import next_stage, release
from .hopper8_finish import finish
from .hopper8_steps import told
from .hopper8_weights import (
    declare_flag,
    first_logits,
    load_scales,
    logits,
    note_codes,
    operand,
    pack_weights,
    pause,
    shares_of,
    start_logits,
    sums_of_codes,
    too_large,
    total,
    weights_of,
)

__all__ = ["consumer8"]


@gluon.jit
def _start_values(a0, a1, v_bufs, stage, D: gl.constexpr, PART: gl.constexpr, O_LAYOUT: gl.constexpr):
    """Begin the product of the weights of a tile with 64 channels of its values."""
    v0 = v_bufs.index(stage * 2).reshape([D, 64]).slice(PART * 64, 64).permute([1, 0])
    v1 = v_bufs.index(stage * 2 + 1).reshape([D, 64]).slice(PART * 64, 64).permute([1, 0])
    t = gl.zeros([64, 64], gl.float32, layout=O_LAYOUT)
    t = warpgroup_mma(a0, v0, t, use_acc=False, is_async=True)
    return warpgroup_mma(a1, v1, t, is_async=True)


@gluon.jit
def _start(
    p0, p1, zero, q_op, k_bufs, v_bufs, bars, stage, phase, after, after_phase, HALF: gl.constexpr, D: gl.constexpr
):
    """Begin the products with the keys and with the first 64 channels: two and two groups."""
    # Before the first product: ptxas must not find an operand made while another product runs.
    a0, a1 = operand(p0, zero, v_bufs.dtype, HALF), operand(p1, zero, v_bufs.dtype, HALF)
    mbarrier.wait(bars[0].index(after), after_phase)
    s0 = start_logits(q_op, k_bufs, after * 2, HALF, D)
    s1 = start_logits(q_op, k_bufs, after * 2 + 1, HALF, D)
    mbarrier.wait(bars[1].index(stage), phase)
    return a0, a1, s0, s1, _start_values(a0, a1, v_bufs, stage, D, 0, HALF)


@gluon.jit
def _first_tile(
    acc0, acc1, p0, p1, zero, q_op, q_factor, k_bufs, v_bufs, scales, extras, bars, stage, phase,
    HALF: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, HEADROOM: gl.constexpr,
):  # fmt: skip
    """Weights, base and sums of the first tile of a job, while the last values of the job before are added."""
    after, after_phase = next_stage(stage, phase, STAGES)
    a0, a1, s0, s1, t = _start(p0, p1, zero, q_op, k_bufs, v_bufs, bars, stage, phase, after, after_phase, HALF, D)
    s0, s1 = warpgroup_mma_wait(2, deps=[s0, s1])
    x0, x1, base = first_logits(s0, s1, q_factor, scales, extras, after, HALF)
    base -= HEADROOM
    w0, w1 = gl.exp2(x0 - gl.expand_dims(base, 1)), gl.exp2(x1 - gl.expand_dims(base, 1))
    new_p0, new_p1 = pack_weights(w0, v_bufs.dtype, HALF), pack_weights(w1, v_bufs.dtype, HALF)
    t, new_p0, new_p1 = warpgroup_mma_wait(0, deps=[t, new_p0, new_p1])
    acc0 += t
    if D == 128:
        t = _start_values(a0, a1, v_bufs, stage, D, 1, HALF)
        t = warpgroup_mma_wait(0, deps=[t])
        acc1 += t
    release(bars[2].index(after))
    exact = shares_of(w0) + shares_of(w1)
    return acc0, acc1, new_p0, new_p1, base, sums_of_codes(new_p0, new_p1), exact, after, after_phase


@gluon.jit
def _step(
    acc0, acc1, p0, p1, base, shares, exact, zero, q_op, q_factor, k_bufs, v_bufs, scales, bars, stage, phase,
    HALF: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, HEADROOM: gl.constexpr, HAS_LSE: gl.constexpr,
    I_W: gl.constexpr,
):  # fmt: skip
    """Add the values of the tile at ``(stage, phase)`` and turn the logits of the next one into weights.

    Weights stay relative to ``base`` until one is as large as e4m3 can say, which few tiles bring about; then the rows of
    this warp get a new one. ``shares`` are sums of rounded weights, ``exact`` those of weights as they are.
    """
    P: gl.constexpr = v_bufs.dtype
    after, after_phase = next_stage(stage, phase, STAGES)
    a0, a1, s0, s1, t = _start(p0, p1, zero, q_op, k_bufs, v_bufs, bars, stage, phase, after, after_phase, HALF, D)
    scale0, scale1 = load_scales(scales, after)
    f0, f1 = q_factor * scale0, q_factor * scale1
    s0, s1 = warpgroup_mma_wait(2, deps=[s0, s1])
    w0 = weights_of(s0, f0, base)
    new_p0 = note_codes(pack_weights(w0, P, HALF), I_W)
    more = exact
    if HAS_LSE:
        more = shares_of(w0)
    stage = pause(stage, I_W)
    t, new_p0 = warpgroup_mma_wait(0, deps=[t, new_p0])
    acc0 += t
    if D == 128:
        t = _start_values(a0, a1, v_bufs, stage, D, 1, HALF)
    w1 = weights_of(s1, f1, base)
    new_p1 = note_codes(pack_weights(w1, P, HALF), I_W)
    if HAS_LSE:
        more += shares_of(w1)
    sums = sums_of_codes(new_p0, new_p1)
    bad = too_large(stage, I_W)
    if D == 128:
        t, new_p0, new_p1 = warpgroup_mma_wait(0, deps=[t, new_p0, new_p1])
        acc1 += t
    release(bars[2].index(after))
    if bad != 0:
        x0, x1 = logits(s0, f0), logits(s1, f1)
        new_base = gl.maximum(base, gl.maximum(gl.max(x0, 1), gl.max(x1, 1)) - HEADROOM)
        shrink = gl.exp2(base - new_base)
        base = new_base
        w0, w1 = gl.exp2(x0 - gl.expand_dims(base, 1)), gl.exp2(x1 - gl.expand_dims(base, 1))
        new_p0, new_p1 = pack_weights(w0, P, HALF), pack_weights(w1, P, HALF)
        sums = sums_of_codes(new_p0, new_p1)
        shares = shares * gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, shares.type.layout)), 1)
        if HAS_LSE:
            more = shares_of(w0) + shares_of(w1)
            exact = exact * gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, exact.type.layout)), 1)
        wide = gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, HALF)), 1)
        acc0 = acc0 * wide
        if D == 128:
            acc1 = acc1 * wide
    if HAS_LSE:
        exact += more
    return acc0, acc1, new_p0, new_p1, base, shares + sums, exact, after, after_phase


@gluon.jit
def _joined(acc0, acc1, D: gl.constexpr, WIDE: gl.constexpr):
    """Both halves of the channels as one tensor; no lane gives anything to another."""
    if D == 64:
        return acc0
    else:
        both = gl.join(acc0, acc1).permute([0, 2, 1]).reshape([64, 128])
        return gl.convert_layout(both, WIDE, assert_trivial=True)


@gluon.jit
def consumer8(
    args, I_W: gl.constexpr, D: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr, GATHER: gl.constexpr,
    HAS_LSE: gl.constexpr, HEADROOM: gl.constexpr,
):  # fmt: skip
    """Do 64 rows of each job of the program; weights and values are e4m3."""
    (
        desc_o, out, lse, v_scale, table, head_row, scale2, _limit, zero, qb, heads, sq, out_b, out_h, out_s,
        q_bufs, q_scales, o_bufs, k_bufs, v_bufs, scales, extras, info, q_full, q_empty, bars,
    ) = args  # fmt: skip
    HALF: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32])
    WIDE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32])
    ROW: gl.constexpr = gl.SliceLayout(1, HALF)
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    q_tile = q_bufs.index(I_W).reshape([64, D])
    row_scales = q_scales.slice(I_W * 64, 64)
    # As if a job without a number had come before: its weights are 0, its values are what the memory holds.
    stage, phase, q_phase, done = STAGES - 1, 1, 0, -2
    acc0 = gl.zeros([64, 64], gl.float32, layout=HALF)
    acc1 = acc0
    p0 = pack_weights(acc0, v_bufs.dtype, HALF)
    p1 = p0
    done_lse = gl.zeros([64], gl.float32, layout=ROW)
    done_sum = done_lse
    job, tiles = told(info, q_full.index(I_W), q_phase)
    job = declare_flag(job, I_W)
    while job != -1:
        q_op = q_tile.load(gl.DotOperandLayout(0, HALF, 4))
        q_factor = row_scales.load(ROW) * scale2
        release(q_empty.index(I_W))
        acc0, acc1, p0, p1, base, shares, exact, stage, phase = _first_tile(
            acc0, acc1, p0, p1, zero, q_op, q_factor, k_bufs, v_bufs, scales, extras, bars, stage, phase,
            HALF, D, STAGES, HEADROOM,
        )  # fmt: skip
        if done >= 0:
            finish(
                _joined(acc0, acc1, D, WIDE), done_sum, done_lse, o_bufs.index(I_W), desc_o, out, lse, v_scale, table,
                head_row, sq, done, qb, heads, out_b * 8, out_h * 8, out_s * 8, I_W, D, DIM, GATHER, HAS_LSE, True,
                ROWS,
            )  # fmt: skip
        acc0 = gl.zeros([64, 64], gl.float32, layout=HALF)
        acc1 = acc0
        for _t in range(tiles - 1):
            acc0, acc1, p0, p1, base, shares, exact, stage, phase = _step(
                acc0, acc1, p0, p1, base, shares, exact, zero, q_op, q_factor, k_bufs, v_bufs, scales, bars,
                stage, phase, HALF, D, STAGES, HEADROOM, HAS_LSE, I_W,
            )  # fmt: skip
        done, done_sum = job, total(shares, HALF)
        if HAS_LSE:
            done_lse = base + gl.log2(total(exact, HALF))
        q_phase ^= 1
        job, tiles = told(info, q_full.index(I_W), q_phase)
    # The last job was one without a number: nothing of it may be on its way when the program ends.
    mbarrier.wait(bars[1].index(stage), phase)
