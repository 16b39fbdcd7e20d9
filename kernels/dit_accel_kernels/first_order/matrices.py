"""Weights times covariances: one matrix product a head, ``[Qb, Kb] x [Kb, D * D]``."""

# Kernels have no types.
# mypy: disallow_untyped_defs=False, disallow_incomplete_defs=False
# mypy: disallow_untyped_decorators=False, disallow_untyped_calls=False

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["matrices_kernel"]


@triton.jit(do_not_specialize=["here", "rows", "kb"])
def matrices_kernel(
    WEIGHT, COV, OUT, here, rows, kb, pitch, size,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a tile of the matrices of one head. Tiles that share covariances follow each other.

    ``here`` is the first head's number within the weights; covariances and matrices begin with it. ``size`` is a multiple
    of 16, ``pitch`` of the rows of weights too.
    """
    tiles = tl.cdiv(rows, BLOCK_M)
    i_m, i_n = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    plane = tl.program_id(1)
    o_m, o_n, o_k = i_m * BLOCK_M + tl.arange(0, BLOCK_M), i_n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if TMA:
        for start in range(0, kb, BLOCK_K):
            b_w = WEIGHT.load([here + plane, i_m * BLOCK_M, start]).reshape(BLOCK_M, BLOCK_K)
            b_c = COV.load([plane, start, i_n * BLOCK_N]).reshape(BLOCK_K, BLOCK_N)
            acc = tl.dot(b_w, b_c, acc)
        OUT.store([plane, i_m * BLOCK_M, i_n * BLOCK_N], acc.to(OUT.dtype).reshape(1, BLOCK_M, BLOCK_N))
    else:
        m_m, m_n = o_m < rows, o_n < size
        p_w = WEIGHT + ((here + plane).to(tl.int64) * rows + o_m)[:, None] * pitch + o_k[None, :]
        p_c = COV + (plane.to(tl.int64) * kb + o_k)[:, None] * size + o_n[None, :]
        for start in range(0, kb, BLOCK_K):
            m_k = start + o_k < kb
            b_w = tl.load(p_w, mask=m_m[:, None] & m_k[None, :], other=0.0)
            b_c = tl.load(p_c, mask=m_k[:, None] & m_n[None, :], other=0.0)
            acc = tl.dot(b_w, b_c, acc, input_precision=PRECISION)
            p_w += BLOCK_K
            p_c += BLOCK_K * size
        p_out = OUT + (plane.to(tl.int64) * rows + o_m)[:, None] * size + o_n[None, :]
        tl.store(p_out, acc.to(OUT.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])
