"""What a consumer of the mean-query kernel for Hopper does with the tiles of a segment; see :mod:`.hopper`."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from ..block_sparse.hopper_steps import next_stage, release

__all__ = ["careful_tiles", "first_tile", "overlapped_tiles"]


@gluon.jit
def _start_logits(q_tile, k_bufs, bars, stage, phase, S_LAYOUT: gl.constexpr, D: gl.constexpr):
    mbarrier.wait(bars[0].index(stage), phase)
    s = gl.zeros([64, 64], gl.float32, layout=S_LAYOUT)
    return warpgroup_mma(q_tile, k_bufs.index(stage).reshape([64, D]).permute([1, 0]), s, use_acc=False, is_async=True)


@gluon.jit
def _start_values(acc_all, acc_kept, p_all, p_kept, v_bufs, bars, stage, phase, D: gl.constexpr):
    mbarrier.wait(bars[1].index(stage), phase)
    v_tile = v_bufs.index(stage).reshape([64, D])
    acc_all = warpgroup_mma(p_all, v_tile, acc_all, is_async=True)
    return acc_all, warpgroup_mma(p_kept, v_tile, acc_kept, is_async=True)


@gluon.jit
def _read_bits(p_bits, tile, there, PER: gl.constexpr):
    """Whether each row keeps the block of a tile, 0 or 1; ``there`` marks rows that exist."""
    block = tile // PER
    return (gl.load(p_bits + block // 32, mask=there, other=0) >> (block % 32)) & 1


@gluon.jit
def _kept(p_all, exact):
    """The weights of rows that keep the block of this tile; those of others are 0. One operation for two weights."""
    mask = gl.expand_dims(gl.convert_layout(-exact, gl.SliceLayout(1, p_all.type.layout)), 1)
    mask = gl.broadcast(mask, p_all)[0]
    return gl.inline_asm_elementwise(
        "and.b32 $0, $1, $2; // $3", "=r,r,r,r", [p_all, mask], dtype=p_all.dtype, is_pure=True, pack=2
    )


@gluon.jit
def _weigh(s, row_max, sum_all, sum_kept, exact, scale2):
    """Weights of a tile relative to ``row_max``, and the sums with them."""
    weights = gl.exp2(s * scale2 - gl.expand_dims(row_max, 1))
    here = gl.sum(weights, 1)
    return weights, sum_all + here, sum_kept + here * exact.to(gl.float32)


@gluon.jit
def _wait_values(acc_all, acc_kept, p_all, p_kept, new_p, sums):
    """Wait for the products with the values, not before the exponentials of the new weights are under way.

    ptxas would move this wait up to that for the logits; it moves it across no branch that depends on the sums of the
    weights. Sums of positive numbers are not negative, so nobody sleeps.
    """
    sums = gl.inline_asm_elementwise(
        """{
        .reg .pred odd; .reg .f32 sum;
        add.f32 sum, $2, $3; setp.lt.f32 odd, sum, 0f00000000;
        @odd nanosleep.u32 1;
        mov.f32 $0, $2; mov.f32 $1, $3;
        }""",
        "=f,=f,f,f", [sums], dtype=gl.float32, is_pure=False, pack=2,
    )  # fmt: skip
    acc_all, acc_kept, p_all, p_kept, new_p = warpgroup_mma_wait(0, deps=[acc_all, acc_kept, p_all, p_kept, new_p])
    return acc_all, acc_kept, new_p, sums


@gluon.jit
def first_tile(q_tile, k_bufs, bars, stage, phase, tile, sk, S_LAYOUT: gl.constexpr, D: gl.constexpr):
    """Logits of the first tile of a segment, which is the one that can be ragged."""
    s = _start_logits(q_tile, k_bufs, bars, stage, phase, S_LAYOUT, D)
    s = warpgroup_mma_wait(0, deps=[s])
    release(bars[2].index(stage))
    o_n = tile * 64 + gl.arange(0, 64, layout=gl.SliceLayout(0, S_LAYOUT))
    return gl.where(gl.expand_dims(o_n < sk, 0), s, float("-inf"))


@gluon.jit
def overlapped_tiles(
    s, q_tile, k_bufs, v_bufs, q_empty, bars, stage, phase, p_bits, there, first, count, scale2,
    D: gl.constexpr, STAGES: gl.constexpr, PER: gl.constexpr, O_LAYOUT: gl.constexpr,
):  # fmt: skip
    """All tiles, weights relative to the maximum of the first: exponentials run under products with values."""
    S_LAYOUT: gl.constexpr = s.type.layout
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    row_max = gl.max(s, 1) * scale2
    exact = _read_bits(p_bits, first + count - 1, there, PER)
    sums = gl.zeros([64], gl.float32, layout=gl.SliceLayout(1, S_LAYOUT))
    weights, sum_all, sum_kept = _weigh(s, row_max, sums, sums, exact, scale2)
    p_all = gl.convert_layout(weights.to(k_bufs.dtype), P_LAYOUT)
    acc_all = gl.zeros([64, D], gl.float32, layout=O_LAYOUT)
    acc_kept = acc_all
    for tile in range(first, first + count - 1):
        p_kept = _kept(p_all, exact)
        after, after_phase = next_stage(stage, phase, STAGES)
        s = _start_logits(q_tile, k_bufs, bars, after, after_phase, S_LAYOUT, D)
        acc_all, acc_kept = _start_values(acc_all, acc_kept, p_all, p_kept, v_bufs, bars, stage, phase, D)
        exact = _read_bits(p_bits, tile, there, PER)
        s = warpgroup_mma_wait(2, deps=[s])
        weights, sum_all, sum_kept = _weigh(s, row_max, sum_all, sum_kept, exact, scale2)
        new_p = gl.convert_layout(weights.to(k_bufs.dtype), P_LAYOUT)
        acc_all, acc_kept, p_all, sum_all = _wait_values(acc_all, acc_kept, p_all, p_kept, new_p, sum_all)
        stage, phase = after, after_phase
        release(bars[2].index(stage))
    release(q_empty)
    p_kept = _kept(p_all, exact)
    acc_all, acc_kept = _start_values(acc_all, acc_kept, p_all, p_kept, v_bufs, bars, stage, phase, D)
    acc_all, acc_kept, p_all, p_kept = warpgroup_mma_wait(0, deps=[acc_all, acc_kept, p_all, p_kept])
    stage, phase = next_stage(stage, phase, STAGES)
    return acc_all, acc_kept, row_max, sum_all, sum_kept, stage, phase


@gluon.jit
def _careful_weights(
    s, acc_all, acc_kept, row_max, sum_all, sum_kept, exact, scale2, dtype: gl.constexpr, P_LAYOUT: gl.constexpr,
    FAST: gl.constexpr,
):  # fmt: skip
    """The weights of a tile and those kept of it; unless FAST, everything follows the maximum so far."""
    if not FAST:
        new_max = gl.maximum(row_max, gl.max(s, 1) * scale2)
        shrink = gl.exp2(row_max - new_max)
        row_max = new_max
        sum_all, sum_kept = sum_all * shrink, sum_kept * shrink
        factor = gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, acc_all.type.layout)), 1)
        acc_all, acc_kept = acc_all * factor, acc_kept * factor
    weights, sum_all, sum_kept = _weigh(s, row_max, sum_all, sum_kept, exact, scale2)
    p_all = gl.convert_layout(weights.to(dtype), P_LAYOUT)
    return p_all, _kept(p_all, exact), acc_all, acc_kept, row_max, sum_all, sum_kept


@gluon.jit
def careful_tiles(
    s, q_tile, k_bufs, v_bufs, q_empty, bars, stage, phase, p_bits, there, first, count, scale2,
    D: gl.constexpr, STAGES: gl.constexpr, PER: gl.constexpr, O_LAYOUT: gl.constexpr, FAST: gl.constexpr,
):  # fmt: skip
    """All tiles, one after the other: the products of one consumer run while another takes exponentials."""
    S_LAYOUT: gl.constexpr = s.type.layout
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    row_max = gl.maximum(gl.max(s, 1) * scale2, -1.0e30)
    exact = _read_bits(p_bits, first + count - 1, there, PER)
    sum_all = gl.zeros([64], gl.float32, layout=gl.SliceLayout(1, S_LAYOUT))
    sum_kept = sum_all
    acc_all = gl.zeros([64, D], gl.float32, layout=O_LAYOUT)
    acc_kept = acc_all
    for tile in range(first, first + count - 1):
        p_all, p_kept, acc_all, acc_kept, row_max, sum_all, sum_kept = _careful_weights(
            s, acc_all, acc_kept, row_max, sum_all, sum_kept, exact, scale2, k_bufs.dtype, P_LAYOUT, FAST
        )
        acc_all, acc_kept = _start_values(acc_all, acc_kept, p_all, p_kept, v_bufs, bars, stage, phase, D)
        stage, phase = next_stage(stage, phase, STAGES)
        s = _start_logits(q_tile, k_bufs, bars, stage, phase, S_LAYOUT, D)
        exact = _read_bits(p_bits, tile, there, PER)
        s, acc_all, acc_kept, p_all, p_kept = warpgroup_mma_wait(0, deps=[s, acc_all, acc_kept, p_all, p_kept])
        release(bars[2].index(stage))
    release(q_empty)
    p_all, p_kept, acc_all, acc_kept, row_max, sum_all, sum_kept = _careful_weights(
        s, acc_all, acc_kept, row_max, sum_all, sum_kept, exact, scale2, k_bufs.dtype, P_LAYOUT, FAST
    )
    acc_all, acc_kept = _start_values(acc_all, acc_kept, p_all, p_kept, v_bufs, bars, stage, phase, D)
    acc_all, acc_kept, p_all, p_kept = warpgroup_mma_wait(0, deps=[acc_all, acc_kept, p_all, p_kept])
    stage, phase = next_stage(stage, phase, STAGES)
    return acc_all, acc_kept, row_max, sum_all, sum_kept, stage, phase
