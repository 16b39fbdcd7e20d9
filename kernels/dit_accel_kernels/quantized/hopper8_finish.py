"""How the 8-bit Hopper kernel writes a finished job: 64 rows of the output and their log-sum-exp; see :mod:`.hopper8`."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from ..block_sparse.hopper_steps import inverse_sum

__all__ = ["finish", "logarithm"]


@gluon.jit
def logarithm(x):
    """Logarithm of base 2 of normal numbers, to one or two units in the last place, and minus infinity of 0."""
    return gl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def finish(
    acc, row_sum, lse_rows, o_buf, desc_o, out, lse, v_scale, table, head_row, sq, i_q, i_h, i_b, heads,
    out_b, out_h, out_s, i_w, D: gl.constexpr, DIM: gl.constexpr, GATHER: gl.constexpr, HAS_LSE: gl.constexpr,
    SCALED: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """Normalise and write 64 rows of the output, through a buffer of their own, and their log-sum-exp (in log 2)."""
    o_tile = o_buf.reshape([64, D])
    inverse = gl.convert_layout(inverse_sum(row_sum), gl.SliceLayout(1, acc.type.layout))
    acc = acc * gl.expand_dims(inverse, 1)
    if SCALED:
        o_c = gl.arange(0, D, layout=gl.SliceLayout(0, acc.type.layout))
        acc = acc * gl.expand_dims(gl.load(v_scale + ((i_b * heads + i_h) * D + o_c)), 0)
    start = i_q * 128 + i_w * 64
    if GATHER:
        table += gl.load(head_row + i_h) * sq
    else:
        tma.store_wait(0)
    gl.thread_barrier()
    o_tile.store(acc.to(o_tile.dtype))
    if GATHER:
        gl.thread_barrier()
        o_m = start + gl.arange(0, 64, layout=gl.SliceLayout(1, ROWS))
        o_d = gl.arange(0, D, layout=gl.SliceLayout(0, ROWS))
        there = gl.expand_dims(o_m.to(gl.int64) < sq, 1)
        if DIM < D:
            there = there & gl.expand_dims(o_d < DIM, 0)
        token = gl.load(table + o_m, mask=o_m.to(gl.int64) < sq, other=0).to(gl.int64)
        p_out = out + i_b.to(gl.int64) * out_b + i_h.to(gl.int64) * out_h
        p_out = p_out + gl.expand_dims(token * out_s, 1) + gl.expand_dims(o_d, 0)
        gl.store(p_out, o_tile.load(ROWS), mask=there)
    else:
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(desc_o, [i_b, i_h, start, 0], o_buf)
    if HAS_LSE:
        o_m = start + gl.arange(0, 64, layout=lse_rows.type.layout)
        token = o_m.to(gl.int64)
        if GATHER:
            token = gl.load(table + o_m, mask=o_m.to(gl.int64) < sq, other=0).to(gl.int64)
        place = lse + (i_b * heads + i_h) * sq + token
        gl.store(place, lse_rows * 0.6931471805599453, mask=o_m.to(gl.int64) < sq)
