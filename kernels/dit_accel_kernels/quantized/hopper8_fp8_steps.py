"""One consumer of the 8-bit Hopper kernel with e4m3 weights and values: its steps and its jobs; see :mod:`.hopper8`."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..block_sparse.hopper_steps import next_stage, release
from .hopper8_finish import finish, logarithm
from .hopper8_steps import place_of, told
from .hopper8_turns import give_first_turn, give_turn, wait_turn
from .hopper8_weights import (
    codes_of,
    codes_of_logits,
    declare_flag,
    first_logits,
    halves,
    load_scales,
    logits,
    operand,
    start_logits,
    sums_of_codes,
    total,
    vote_on_sums,
    voted,
)

__all__ = ["consumer8"]


@gluon.jit
def _products(
    acc, p0, p1, zero, q_op, k_bufs, v_bufs, scales, bars, stage, phase,
    WHOLE: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr, I_W: gl.constexpr,
    FIRST: gl.constexpr = False,
):  # fmt: skip
    """Add the values of one tile and multiply the queries with the keys of the next.

    With ``FIRST`` the queries are read, and their buffer is given back, while the values are multiplied.
    """
    after, after_phase = next_stage(stage, phase, STAGES)
    WIDE: gl.constexpr = acc.type.layout
    a0, a1 = operand(p0, WIDE), operand(p1, WIDE)
    mbarrier.wait(bars[0].index(after), after_phase)
    if TURNS:
        after = wait_turn(after, I_W)
    t = gl.zeros([64, D], gl.float32, layout=WIDE)
    t = warpgroup_mma(a0, v_bufs.index(stage * 2).reshape([D, 64]).permute([1, 0]), t, use_acc=False, is_async=True)
    t = warpgroup_mma(a1, v_bufs.index(stage * 2 + 1).reshape([D, 64]).permute([1, 0]), t, is_async=True)
    if FIRST:
        # In registers, though a product could read them from shared memory: that takes power, and power is the limit.
        q_tile, q_empty = q_op
        q_op = q_tile.load(gl.DotOperandLayout(0, WHOLE, 4))
    s = start_logits(q_op, k_bufs, after, WHOLE, D)
    if FIRST:
        release(q_empty)
    scale0, scale1 = load_scales(scales, after)
    t = warpgroup_mma_wait(1, deps=[t])
    acc += t
    acc, s = warpgroup_mma_wait(0, deps=[acc, s])
    if TURNS:
        scale0 = give_turn(scale0, zero, I_W)
    return acc, s, q_op, scale0, scale1, after, after_phase


@gluon.jit
def _first_tile(
    acc, p0, p1, zero, queries, q_factor, k_bufs, v_bufs, scales, extras, bars, stage, phase, masked,
    HALF: gl.constexpr, WHOLE: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, HEADROOM: gl.constexpr,
    TURNS: gl.constexpr, I_W: gl.constexpr,
):  # fmt: skip
    """Weights, base and sums of the first tile of a job, and the last values of the job before."""
    acc, s, q_op, _scale0, _scale1, after, after_phase = _products(
        acc, p0, p1, zero, queries, k_bufs, v_bufs, scales, bars, stage, phase, WHOLE, D, STAGES, TURNS, I_W, True
    )
    s0, s1 = halves(s, HALF)
    x0, x1, base = first_logits(s0, s1, q_factor, scales, extras, after, masked, HALF)
    release(bars[1].index(after))
    base -= HEADROOM
    p0, p1 = codes_of_logits(x0, base), codes_of_logits(x1, base)
    return acc, p0, p1, base, sums_of_codes(p0, p1), q_op, after, after_phase


@gluon.jit
def _step(
    acc, p0, p1, base, shares, zero, limit, q_op, q_factor, k_bufs, v_bufs, scales, bars, stage, phase,
    HALF: gl.constexpr, WHOLE: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, HEADROOM: gl.constexpr,
    TURNS: gl.constexpr, LINES: gl.constexpr, I_W: gl.constexpr,
):  # fmt: skip
    """Add the values of the tile at ``(stage, phase)`` and turn the logits of the next one into weights.

    Weights stay relative to ``base`` until one is as large as e4m3 can say, which few tiles bring about; then the rows of
    this warp get a new one. ``shares`` are sums of rounded weights.
    """
    acc, s, q_op, scale0, scale1, after, after_phase = _products(
        acc, p0, p1, zero, q_op, k_bufs, v_bufs, scales, bars, stage, phase, WHOLE, D, STAGES, TURNS, I_W
    )
    release(bars[1].index(after))
    f0, f1 = q_factor * scale0, q_factor * scale1
    s0, s1 = halves(s, HALF)
    p0, p1 = codes_of(s0, f0, base, LINES), codes_of(s1, f1, base, LINES)
    sums = vote_on_sums(sums_of_codes(p0, p1), limit, I_W)
    if voted(stage, I_W) != 0:
        x0, x1 = logits(s0, f0), logits(s1, f1)
        new_base = gl.maximum(base, gl.maximum(gl.max(x0, 1), gl.max(x1, 1)) - HEADROOM)
        shrink = gl.exp2(base - new_base)
        base = new_base
        p0, p1 = codes_of_logits(x0, base), codes_of_logits(x1, base)
        sums = sums_of_codes(p0, p1)
        shares = shares * gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, shares.type.layout)), 1)
        acc = acc * gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout)), 1)
    return acc, p0, p1, base, shares + sums, after, after_phase


@gluon.jit
def consumer8(
    args, I_W: gl.constexpr, D: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr, GATHER: gl.constexpr,
    HAS_LSE: gl.constexpr, HEADROOM: gl.constexpr, TURNS: gl.constexpr, LINES: gl.constexpr,
):  # fmt: skip
    """Do 64 rows of each job of the program; weights and values are e4m3."""
    (
        desc_o, out, lse, v_scale, table, head_row, scale2, limit, zero, heads, sq, out_b, out_h, out_s,
        q_bufs, _q_own, q_scales, o_bufs, k_bufs, v_bufs, scales, extras, info, q_full, q_empty, bars,
    ) = args  # fmt: skip
    HALF: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32])
    WHOLE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    WIDE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32])
    ROW: gl.constexpr = gl.SliceLayout(1, HALF)
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    q_tile = q_bufs.index(I_W).reshape([64, D])
    row_scales = q_scales.slice(I_W * 64, 64)
    # As if a job without a number had come before: its weights are 0, its values are what the memory holds.
    stage, phase, q_phase, done = STAGES - 1, 1, 0, -2
    acc = gl.zeros([64, D], gl.float32, layout=WIDE)
    done_lse = gl.zeros([64], gl.float32, layout=ROW)
    done_sum = done_lse
    p0 = codes_of_logits(gl.full([64, 64], -1000.0, gl.float32, layout=HALF), done_lse)
    p1 = p0
    job, tiles, masked = told(info, q_full.index(I_W), q_phase)
    job = declare_flag(job, I_W)
    if TURNS and I_W == 1:
        job = give_first_turn(job)
    while job != -1:
        q_factor = row_scales.load(ROW) * scale2
        o_q, o_h, o_b = place_of(info, q_phase ^ 1)
        queries = (q_tile, q_empty.index(I_W))
        acc, p0, p1, base, shares, q_op, stage, phase = _first_tile(
            acc, p0, p1, zero, queries, q_factor, k_bufs, v_bufs, scales, extras, bars, stage, phase, masked,
            HALF, WHOLE, D, STAGES, HEADROOM, TURNS, I_W,
        )  # fmt: skip
        if done >= 0:
            finish(
                acc, done_sum, done_lse, o_bufs.index(I_W), desc_o, out, lse, v_scale, table,
                head_row, sq, o_q, o_h, o_b, heads, out_b * 8, out_h * 8, out_s * 8, I_W, D, DIM, GATHER, HAS_LSE,
                True, ROWS,
            )  # fmt: skip
        acc = gl.zeros([64, D], gl.float32, layout=WIDE)
        for _t in range(tiles - 1):
            acc, p0, p1, base, shares, stage, phase = _step(
                acc, p0, p1, base, shares, zero, limit, q_op, q_factor, k_bufs, v_bufs, scales, bars,
                stage, phase, HALF, WHOLE, D, STAGES, HEADROOM, TURNS, LINES, I_W,
            )  # fmt: skip
        done, done_sum = job, total(shares, HALF)
        if HAS_LSE:
            done_lse = base + logarithm(done_sum)
        q_phase ^= 1
        job, tiles, masked = told(info, q_full.index(I_W), q_phase)
    if TURNS and I_W == 0:
        stage = wait_turn(stage, I_W)  # the other gave it one turn too many
