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

__all__ = ["finish", "first_tile", "gather_rows", "next_stage", "pool_bias", "release", "step"]


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    """The ring position after ``(stage, phase)``."""
    if STAGES == 1:
        return stage, phase ^ 1
    wrap = stage == STAGES - 1
    return gl.where(wrap, 0, stage + 1), gl.where(wrap, phase ^ 1, phase)


@gluon.jit
def release(bar):
    """Say that all threads of this warpgroup have done with a buffer."""
    gl.thread_barrier()
    mbarrier.arrive(bar, count=1)


@gluon.jit
def _softmax(s, row_max, row_sum, scale2, SCALED: gl.constexpr):
    """Weights of a tile, what the sums so far shrink by, and the new maximum and sum."""
    if SCALED:
        new_max = gl.maximum(row_max, gl.max(s, 1))
        weights = gl.exp2(s - gl.expand_dims(new_max, 1))
    else:
        new_max = gl.maximum(row_max, gl.max(s, 1) * scale2)
        weights = gl.exp2(s * scale2 - gl.expand_dims(new_max, 1))
    shrink = gl.exp2(row_max - new_max)
    return weights, shrink, new_max, row_sum * shrink + gl.sum(weights, 1)


@gluon.jit
def pool_bias(bias, bits, start, kb, BLOCK_N: gl.constexpr):
    """What to add to the scaled logits of the pooled keys from ``start``: minus infinity where a block is exact."""
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    o_k = start + gl.arange(0, BLOCK_N, layout=LINE)
    word = gl.load(bits + o_k // 32, mask=o_k < kb, other=-1)
    value = gl.load(bias + o_k, mask=o_k < kb, other=float("-inf"))
    return gl.where(((word >> (o_k % 32)) & 1) == 0, value * 1.4426950408889634, float("-inf"))


@gluon.jit
def _mask(s, scale2, extra, limit, KIND: gl.constexpr, S_LAYOUT: gl.constexpr, BLOCK_N: gl.constexpr):
    """Mask the logits of a ragged tile (``KIND`` 1) or scale those of a pooled one and add its bias (``KIND`` 2).

    Pooled keys must be finite: a select against NaN here costs registers that are not there.
    """
    if KIND == 1:
        o_k = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, S_LAYOUT))
        s = gl.where(gl.expand_dims(o_k < limit, 0), s, float("-inf"))
    if KIND == 2:
        extra = gl.expand_dims(gl.convert_layout(extra, gl.SliceLayout(0, S_LAYOUT)), 0)
        s = s * scale2 + extra
    return s


@gluon.jit
def first_tile(
    q_tile, k_bufs, bars, stage, phase, scale2, extra, limit, KIND: gl.constexpr,
    S_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Weights, maximum and sum of the first tile of a job."""
    zeros = gl.zeros([64, BLOCK_N], gl.float32, layout=S_LAYOUT)
    mbarrier.wait(bars[0].index(stage), phase)
    k_tile = k_bufs.index(stage).reshape([BLOCK_N, D]).permute([1, 0])
    s = warpgroup_mma(q_tile, k_tile, zeros, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    release(bars[2].index(stage))
    s = _mask(s, scale2, extra, limit, KIND, S_LAYOUT, BLOCK_N)
    row_max = gl.full([64], -1.0e30, gl.float32, layout=gl.SliceLayout(1, S_LAYOUT))
    weights, _, row_max, row_sum = _softmax(s, row_max, gl.zeros_like(row_max), scale2, KIND == 2)
    return gl.convert_layout(weights.to(q_tile.dtype), P_LAYOUT), row_max, row_sum


@gluon.jit
def step(
    acc, p, row_max, row_sum, q_tile, k_bufs, v_bufs, bars, turn, i_w, turn_phase, stage, phase, scale2, extra, limit,
    KIND: gl.constexpr, S_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr,
    BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, PINGPONG: gl.constexpr,
):  # fmt: skip
    """Add the values of the tile at ``(stage, phase)`` and turn the logits of the next one into weights."""
    k_full, v_full, empty, never = bars
    zeros = gl.zeros([64, BLOCK_N], gl.float32, layout=S_LAYOUT)
    after, after_phase = next_stage(stage, phase, STAGES)
    mbarrier.wait(k_full.index(after), after_phase)
    if PINGPONG:
        mbarrier.wait(turn.index(i_w), turn_phase)
    k_tile = k_bufs.index(after).reshape([BLOCK_N, D]).permute([1, 0])
    s = warpgroup_mma(q_tile, k_tile, zeros, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(stage), phase)
    acc = warpgroup_mma(p, v_bufs.index(stage).reshape([BLOCK_N, D]), acc, is_async=True)
    if PINGPONG:
        release(turn.index(1 - i_w))
    s = warpgroup_mma_wait(1, deps=[s])
    s = _mask(s, scale2, extra, limit, KIND, S_LAYOUT, BLOCK_N)
    weights, shrink, row_max, row_sum = _softmax(s, row_max, row_sum, scale2, KIND == 2)
    new_p = gl.convert_layout(weights.to(p.dtype), P_LAYOUT)
    # ptxas would move the second wait up, ahead of the exponentials, so that nothing ran under the product. It does not
    # move it out of a basic block, and this wait, which never waits, ends one. The new weights pass through the second
    # wait to keep LLVM from moving them.
    mbarrier.wait(never, 1)
    acc, p, new_p = warpgroup_mma_wait(0, deps=[acc, p, new_p])
    release(empty.index(after))
    acc = acc * gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, O_LAYOUT)), 1)
    return acc, new_p, row_max, row_sum, after, after_phase, turn_phase ^ 1


@gluon.jit
def gather_rows(x, token, valid, q_buf, stride, D: gl.constexpr, ROWS: gl.constexpr):
    """Copy the query rows ``token`` into a shared buffer."""
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, ROWS))
    rows = gl.load(
        x + gl.expand_dims(token * stride, 1) + gl.expand_dims(o_d, 0), mask=gl.expand_dims(valid, 1), other=0.0
    )
    gl.thread_barrier()
    q_buf.store(rows)
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def finish(
    acc, row_max, row_sum, q_tile, q_buf, desc_o, out, lse, table, head_row, table_s, i_q, i_h, i_b, heads,
    out_b, out_h, out_s, i_w,
    D: gl.constexpr, GATHER: gl.constexpr, HAS_LSE: gl.constexpr, ROWS: gl.constexpr, O_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Normalise and write 64 rows of the output, through the buffer of their queries, and their log-sum-exp."""
    S_ROW: gl.constexpr = row_sum.type.layout
    empty = row_sum == 0.0
    safe = gl.where(empty, 1.0, row_sum)
    inverse = gl.convert_layout(gl.where(empty, 0.0, 1.0 / safe), gl.SliceLayout(1, O_LAYOUT))
    start = i_q * 128 + i_w * 64
    head = i_b * heads + i_h
    # Read and compared (as int64) again: what is kept over the loops costs registers.
    if GATHER:
        table += gl.load(head_row + i_h) * table_s
    if HAS_LSE:
        o_m = start + gl.arange(0, 64, layout=S_ROW)
        value = gl.where(empty, float("-inf"), (row_max + gl.log2(safe)) * 0.6931471805599453)
        token = o_m.to(gl.int64)
        if GATHER:
            token = gl.load(table + o_m, mask=o_m.to(gl.int64) < table_s, other=0).to(gl.int64)
        gl.store(lse + head * table_s + token, value, mask=o_m.to(gl.int64) < table_s)
    q_tile.store((acc * gl.expand_dims(inverse, 1)).to(q_tile.dtype))
    if GATHER:
        gl.thread_barrier()
        o_m = start + gl.arange(0, 64, layout=gl.SliceLayout(1, ROWS))
        o_d = gl.arange(0, D, layout=gl.SliceLayout(0, ROWS))
        token = gl.load(table + o_m, mask=o_m.to(gl.int64) < table_s, other=0).to(gl.int64)
        p_out = out + i_b.to(gl.int64) * out_b + i_h.to(gl.int64) * out_h
        p_out = p_out + gl.expand_dims(token * out_s, 1) + gl.expand_dims(o_d, 0)
        gl.store(p_out, q_tile.load(ROWS), mask=gl.expand_dims(o_m.to(gl.int64) < table_s, 1))
    else:
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(desc_o, [i_b, i_h, start, 0], q_buf)
        tma.store_wait(0)
