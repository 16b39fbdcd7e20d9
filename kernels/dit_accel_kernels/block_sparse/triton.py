"""Portable Triton kernel: one program per tile of query rows walks that row's list of key blocks.

Logits are kept in units of ``scale * log2(e)``, so that the softmax needs ``exp2`` and one multiply-add per logit. The
running maximum starts at a large negative number instead of minus infinity: rows without a visible key then need no
branch, they end with a sum of 0.

Head sizes that are no power of two are split into one (96 = 64 + 32) instead of padded to the next.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .specs import aot_specs

__all__ = ["AOT_SPECS", "block_sparse_fwd_kernel"]


@triton.jit
def _load_tile(
    x, stride_s, i_b, i_h, start, b_rows, COL: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
    BLOCK_N: tl.constexpr, TMA: tl.constexpr, ROW_MASK: tl.constexpr,
):  # fmt: skip
    """Load columns ``COL`` to ``COL + WIDTH`` of the keys from ``start``; ``b_rows`` marks those to read."""
    if TMA:
        # Zeros come back from beyond the last key and the last column.
        tile = x.load([i_b, i_h, start, COL]).reshape(BLOCK_N, WIDTH)
    else:
        o_n = tl.arange(0, BLOCK_N)
        o_d = COL + tl.arange(0, WIDTH)
        # [BLOCK_N, WIDTH]; the tile starts anywhere (int64), within it offsets are small
        p_x = x + tl.cast(start, tl.int64) * stride_s + (o_n[:, None] * stride_s + o_d[None, :])
        if ROW_MASK and COL + WIDTH > D:
            tile = tl.load(p_x, mask=b_rows[:, None] & (o_d[None, :] < D), other=0.0)
        elif ROW_MASK:
            tile = tl.load(p_x, mask=b_rows[:, None], other=0.0)
        elif COL + WIDTH > D:
            tile = tl.load(p_x, mask=(o_d < D)[None, :], other=0.0)
        else:
            tile = tl.load(p_x)
    return tile


@triton.jit
def _gather_tile(x, stride_s, key, b_rows, COL: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Load columns ``COL`` to ``COL + WIDTH`` of the keys ``key`` that ``b_rows`` marks."""
    o_d = COL + tl.arange(0, WIDTH)
    p_x = (x + key.to(tl.int64) * stride_s)[:, None] + o_d[None, :]  # keys lie anywhere: int64
    if COL + WIDTH > D:
        return tl.load(p_x, mask=b_rows[:, None] & (o_d[None, :] < D), other=0.0)
    return tl.load(p_x, mask=b_rows[:, None], other=0.0)


@triton.jit
def _logits(q0, q1, k0, k1, D1: tl.constexpr, PRECISION: tl.constexpr):
    """Multiply ``[BLOCK_M, D]`` queries with ``[BLOCK_N, D]`` keys, both split in two parts."""
    logits = tl.dot(q0, k0.T, input_precision=PRECISION)
    if D1 > 0:
        logits = tl.dot(q1, k1.T, logits, input_precision=PRECISION)
    return logits


@triton.jit
def _update(
    acc0, acc1, row_max, row_sum, logits, v0, v1, scale2, D1: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """One step of the online softmax; masked ``logits`` are minus infinity."""
    new_max = tl.maximum(row_max, tl.max(logits, 1) * scale2)
    weights = tl.exp2(logits * scale2 - new_max[:, None])  # [BLOCK_M, BLOCK_N]
    shrink = tl.exp2(row_max - new_max)
    row_sum = row_sum * shrink + tl.sum(weights, 1)
    weights = weights.to(v0.dtype)
    acc0 = tl.dot(weights, v0, acc0 * shrink[:, None], input_precision=PRECISION)
    if D1 > 0:
        acc1 = tl.dot(weights, v1, acc1 * shrink[:, None], input_precision=PRECISION)
    return acc0, acc1, new_max, row_sum


@triton.jit
def _inside(q_lo, q_hi, k_code, o_q, o_k, m_q, m_k, sq, sk):
    """Say which keys are in the windows of which queries: bool ``[BLOCK_M, BLOCK_N]``."""
    code = tl.load(k_code + o_k, mask=m_k, other=0)
    free = code < 0
    lo, hi = tl.load(q_lo + o_q, mask=m_q, other=0), tl.load(q_hi + o_q, mask=m_q, other=0)
    inside = (lo[:, None] <= code[None, :]) & (code[None, :] < hi[:, None])
    for axis in tl.static_range(1, 3):
        code = tl.load(k_code + axis * sk.to(tl.int64) + o_k, mask=m_k, other=0)
        lo = tl.load(q_lo + axis * sq.to(tl.int64) + o_q, mask=m_q, other=0)
        hi = tl.load(q_hi + axis * sq.to(tl.int64) + o_q, mask=m_q, other=0)
        inside = inside & (lo[:, None] <= code[None, :]) & (code[None, :] < hi[:, None])
    return inside | free[None, :]


@triton.jit
def _seen_codes(lo, hi, k_base, tiles, i_tile, AXIS: tl.constexpr):
    """Bits of the ten codes of an axis, from the base of a tile on, that each query sees."""
    base = tl.load(k_base + AXIS * tiles + i_tile)
    lo = tl.minimum(tl.maximum(lo - base, 0), 10)
    hi = tl.minimum(tl.maximum(hi - base, 0), 10)
    return (((1 << hi) - 1) & -(1 << lo)) << (10 * AXIS)


@triton.jit
def _inside_near(lo0, hi0, lo1, hi1, lo2, hi2, k_bits, k_base, o_k, m_k, whole, tiles, i_tile):
    """The same with two operations a logit instead of seven, where :func:`.near.window_bits` has bits for the keys.

    A key that ``m_k`` excludes has a bit that no query has; in a ``whole`` block queries have all others.
    """
    q_bits = _seen_codes(lo0, hi0, k_base, tiles, i_tile, 0)
    q_bits |= _seen_codes(lo1, hi1, k_base, tiles, i_tile, 1)
    q_bits |= _seen_codes(lo2, hi2, k_base, tiles, i_tile, 2)
    q_bits = tl.where(whole, 1073741823, q_bits)
    b_bits = tl.load(k_bits + o_k, mask=m_k, other=1073741824)
    return (q_bits[:, None] & b_bits[None, :]) == b_bits[None, :]


# What changes with the number of tokens alone must not compile another kernel.
@triton.jit(
    do_not_specialize=[
        "sq", "sk", "se", "list_b", "list_h", "bits_b", "bits_h", "bias_b", "bias_h",
        "more_list_b", "more_list_h", "more_bias_b", "more_bias_h",
    ]
)  # fmt: skip
def block_sparse_fwd_kernel(
    q, k, v, k_hi, v_hi, out, lse, row_start, full, partial, indices, table, head_row, pool_k, pool_v,
    pool_k_hi, pool_v_hi, bias, bits, q_lo, q_hi, k_code, key_valid,
    more_k, more_v, more_bias, more_start, more_count, more_indices, scale, sq, sk, se,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, out_b, out_h, out_s,
    pool_k_b, pool_k_h, pool_k_s, pool_v_b, pool_v_h, pool_v_s, list_b, list_h, bits_b, bits_h, bias_b, bias_h,
    more_k_b, more_k_h, more_k_s, more_v_b, more_v_h, more_v_s, more_list_b, more_list_h, more_bias_b, more_bias_h,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, EVEN_K: tl.constexpr,
    HAS_PARTIAL: tl.constexpr, HAS_WINDOWS: tl.constexpr, HAS_VALID: tl.constexpr, HAS_ORDER: tl.constexpr,
    HAS_POOLED: tl.constexpr, HAS_LSE: tl.constexpr, HAS_GATHERED: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr, k_base=None, NEAR_WINDOWS: tl.constexpr = False,
):  # fmt: skip
    SUB: tl.constexpr = BLOCK_K // BLOCK_N
    i_m, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    w_h, w_b = i_h.to(tl.int64), i_b.to(tl.int64)
    i_q = i_m * BLOCK_M // BLOCK_Q
    scale2 = scale * 1.4426950408889634
    kb = tl.cdiv(sk, BLOCK_K)

    o_q = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_q = o_q < sq
    token = o_q.to(tl.int64)
    if HAS_ORDER:
        table += tl.load(head_row + i_h).to(tl.int64) * sq
        token = tl.load(table + o_q, mask=m_q, other=0).to(tl.int64)
    o_n, o_d0, o_d1 = tl.arange(0, BLOCK_N), tl.arange(0, D0), D0 + tl.arange(0, D1 if D1 > 0 else D0)
    # [BLOCK_M, D0] and [BLOCK_M, D1]
    p_q = q + w_b * q_b + w_h * q_h + token[:, None] * q_s
    q0 = tl.load(p_q + o_d0[None, :], mask=m_q[:, None] & (o_d0[None, :] < D), other=0.0)
    q1 = q0
    acc0 = tl.zeros([BLOCK_M, D0], dtype=tl.float32)
    acc1 = acc0
    if D1 > 0:
        q1 = tl.load(p_q + o_d1[None, :], mask=m_q[:, None] & (o_d1[None, :] < D), other=0.0)
        acc1 = tl.zeros([BLOCK_M, D1], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], -1.0e30, dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    if not TMA:
        k += w_b * k_b + w_h * k_h
        v += w_b * v_b + w_h * v_h
        k_hi, v_hi = k, v
    if HAS_VALID:
        key_valid += w_b * sk

    i_row = w_b * list_b + w_h * list_h + i_q
    indices += tl.load(row_start + i_row).to(tl.int64)
    n_full = tl.load(full + i_row)
    n_all = n_full
    if HAS_PARTIAL:
        n_all += tl.load(partial + i_row)
    n_plain = n_full
    if not EVEN_K:
        # Ids are sorted: a ragged last block is the last whole block of its row. It moves to the masked loop.
        last = tl.load(indices + n_full - 1, mask=n_full > 0, other=-1)
        n_plain -= (last == kb - 1).to(tl.int32)

    if HAS_GATHERED:
        more_k += w_b * more_k_b + w_h * more_k_h
        more_v += w_b * more_v_b + w_h * more_v_h
        more_bias += w_b * more_bias_b + w_h * more_bias_h
        i_more = w_b * more_list_b + w_h * more_list_h + i_q
        more_indices += tl.load(more_start + i_more).to(tl.int64)
        n_more = tl.load(more_count + i_more)
        o_g = tl.arange(0, BLOCK_G)
        for start in tl.range(0, n_more * GROUP, BLOCK_G, num_stages=2):
            o_e = start + o_g
            m_e = o_e < n_more * GROUP
            o_e = tl.load(more_indices + o_e // GROUP, mask=m_e, other=0) * GROUP + o_e % GROUP
            m_e = m_e & (o_e < se)
            b_bias = tl.load(more_bias + o_e, mask=m_e, other=float("-inf"))
            m_e = b_bias > float("-inf")
            k0 = _gather_tile(more_k, more_k_s, o_e, m_e, 0, D0, D)
            k1 = k0
            if D1 > 0:
                k1 = _gather_tile(more_k, more_k_s, o_e, m_e, D0, D1, D)
            logits = _logits(q0, q1, k0, k1, D1, PRECISION) + (b_bias / scale)[None, :]
            v0 = _gather_tile(more_v, more_v_s, o_e, m_e, 0, D0, D)
            v1 = v0
            if D1 > 0:
                v1 = _gather_tile(more_v, more_v_s, o_e, m_e, D0, D1, D)
            acc0, acc1, row_max, row_sum = _update(acc0, acc1, row_max, row_sum, logits, v0, v1, scale2, D1, PRECISION)

    m_k = o_n >= 0
    # Pooled, masked, plain; the first two in two stages: in most other arrangements ptxas gives up overlapping the wgmma
    # of all three loops (C7515), and deeper buffers would leave room for one program an SM instead of two.
    if HAS_POOLED:
        if not TMA:
            pool_k += w_b * pool_k_b + w_h * pool_k_h
            pool_v += w_b * pool_v_b + w_h * pool_v_h
            pool_k_hi, pool_v_hi = pool_k, pool_v
        bias += w_b * bias_b + w_h * bias_h
        bits += w_b * bits_b + w_h * bits_h + i_q.to(tl.int64) * tl.cdiv(kb, 32)
        for start in tl.range(0, kb, BLOCK_N, num_stages=2):
            o_k = start + o_n
            word = tl.load(bits + o_k // 32, mask=o_k < kb, other=-1)
            b_bias = tl.load(bias + o_k, mask=o_k < kb, other=float("-inf"))
            m_k = (((word >> (o_k % 32)) & 1) == 0) & (b_bias > float("-inf"))
            b_bias = tl.where(m_k, b_bias / scale, float("-inf"))
            k0 = _load_tile(pool_k, pool_k_s, i_b, i_h, start, m_k, 0, D0, D, BLOCK_N, TMA, True)
            k1 = k0
            if D1 > 0:
                k1 = _load_tile(pool_k_hi, pool_k_s, i_b, i_h, start, m_k, D0, D1, D, BLOCK_N, TMA, True)
            logits = _logits(q0, q1, k0, k1, D1, PRECISION) + b_bias[None, :]
            v0 = _load_tile(pool_v, pool_v_s, i_b, i_h, start, m_k, 0, D0, D, BLOCK_N, TMA, True)
            v1 = v0
            if D1 > 0:
                v1 = _load_tile(pool_v_hi, pool_v_s, i_b, i_h, start, m_k, D0, D1, D, BLOCK_N, TMA, True)
            acc0, acc1, row_max, row_sum = _update(acc0, acc1, row_max, row_sum, logits, v0, v1, scale2, D1, PRECISION)

    if NEAR_WINDOWS:
        p_q, w_q = o_q, sq.to(tl.int64)
        lo0, hi0 = tl.load(q_lo + p_q, mask=m_q, other=0), tl.load(q_hi + p_q, mask=m_q, other=0)
        lo1, hi1 = tl.load(q_lo + w_q + p_q, mask=m_q, other=0), tl.load(q_hi + w_q + p_q, mask=m_q, other=0)
        lo2, hi2 = tl.load(q_lo + 2 * w_q + p_q, mask=m_q, other=0), tl.load(q_hi + 2 * w_q + p_q, mask=m_q, other=0)
    if HAS_PARTIAL or not EVEN_K:
        for j in tl.range(n_plain * SUB, n_all * SUB, num_stages=2):
            start = tl.load(indices + j // SUB) * BLOCK_K + (j % SUB) * BLOCK_N
            m_k = start + o_n < sk
            if HAS_VALID:
                m_k = m_k & (tl.load(key_valid + start + o_n, mask=m_k, other=0) != 0)
            k0 = _load_tile(k, k_s, i_b, i_h, start, m_k, 0, D0, D, BLOCK_N, TMA, True)
            k1 = k0
            if D1 > 0:
                k1 = _load_tile(k_hi, k_s, i_b, i_h, start, m_k, D0, D1, D, BLOCK_N, TMA, True)
            logits = _logits(q0, q1, k0, k1, D1, PRECISION)
            if NEAR_WINDOWS:
                inside = _inside_near(
                    lo0, hi0, lo1, hi1, lo2, hi2, k_code, k_base, start + o_n, m_k, j < n_full * SUB,
                    tl.cdiv(sk, BLOCK_N), start // BLOCK_N,
                )  # fmt: skip
                logits = tl.where(inside, logits, float("-inf"))
            else:
                logits = tl.where(m_k[None, :], logits, float("-inf"))
                if HAS_WINDOWS:
                    inside = _inside(q_lo, q_hi, k_code, o_q, start + o_n, m_q, m_k, sq, sk)
                    logits = tl.where(inside | (j < n_full * SUB), logits, float("-inf"))
            v0 = _load_tile(v, v_s, i_b, i_h, start, m_k, 0, D0, D, BLOCK_N, TMA, True)
            v1 = v0
            if D1 > 0:
                v1 = _load_tile(v_hi, v_s, i_b, i_h, start, m_k, D0, D1, D, BLOCK_N, TMA, True)
            acc0, acc1, row_max, row_sum = _update(acc0, acc1, row_max, row_sum, logits, v0, v1, scale2, D1, PRECISION)

    for j in tl.range(0, n_plain * SUB):
        start = tl.load(indices + j // SUB) * BLOCK_K + (j % SUB) * BLOCK_N
        if HAS_VALID:
            m_k = tl.load(key_valid + start + o_n) != 0
        k0 = _load_tile(k, k_s, i_b, i_h, start, m_k, 0, D0, D, BLOCK_N, TMA, HAS_VALID)
        k1 = k0
        if D1 > 0:
            k1 = _load_tile(k_hi, k_s, i_b, i_h, start, m_k, D0, D1, D, BLOCK_N, TMA, HAS_VALID)
        logits = _logits(q0, q1, k0, k1, D1, PRECISION)
        if HAS_VALID:
            logits = tl.where(m_k[None, :], logits, float("-inf"))
        v0 = _load_tile(v, v_s, i_b, i_h, start, m_k, 0, D0, D, BLOCK_N, TMA, HAS_VALID)
        v1 = v0
        if D1 > 0:
            v1 = _load_tile(v_hi, v_s, i_b, i_h, start, m_k, D0, D1, D, BLOCK_N, TMA, HAS_VALID)
        acc0, acc1, row_max, row_sum = _update(acc0, acc1, row_max, row_sum, logits, v0, v1, scale2, D1, PRECISION)

    if HAS_ORDER:
        # Read again, under another policy lest the compiler reuse the first: kept over the loops it costs registers.
        token = tl.load(table + o_q, mask=m_q, other=0, eviction_policy="evict_first").to(tl.int64)
    empty = row_sum == 0.0
    scaling = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, row_sum))
    p_out = out + w_b * out_b + w_h * out_h + token[:, None] * out_s
    out0 = (acc0 * scaling[:, None]).to(out.dtype.element_ty)
    tl.store(p_out + o_d0[None, :], out0, mask=m_q[:, None] & (o_d0[None, :] < D))
    if D1 > 0:
        out1 = (acc1 * scaling[:, None]).to(out.dtype.element_ty)
        tl.store(p_out + o_d1[None, :], out1, mask=m_q[:, None] & (o_d1[None, :] < D))
    if HAS_LSE:
        value = (row_max + tl.log2(tl.where(empty, 1.0, row_sum))) * 0.6931471805599453
        p_lse = lse + (w_b * tl.num_programs(1) + w_h) * sq + token
        tl.store(p_lse, tl.where(empty, float("-inf"), value), mask=m_q)


AOT_SPECS = aot_specs(block_sparse_fwd_kernel)
