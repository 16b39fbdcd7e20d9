"""Portable Triton kernel of 8-bit attention: one program per tile of query rows walks that row's list of key blocks.

The integer (or e4m3) products of queries and keys become logits in units of ``log2(e)`` by one factor per row and key
block, which is folded into the multiply-add that the softmax needs anyway. Weights are multiplied with the values in one of
three ways:

* 16 bits, as in the 16-bit kernel;
* e4m3, shifted up by 2**8 so that small weights keep their bits, with sums across tiles in float32 registers where
  ``TWO_LEVEL`` is set, because the tensor cores' own accumulator has only about 14 bits for this type on Hopper;
* INT8 of 0 to 127, scaled to the largest weight of each row *of the tile*, and summed across tiles in float32 with that
  factor. The sum that normalises a row is that of the rounded weights: those that round to zero move no output towards 0.

8-bit values lie transposed with their keys permuted (:func:`dit_accel_kernels.quantize.operand_order`), so weights go from
the first product to the second within the registers of a thread.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .specs import aot_specs

__all__ = ["AOT_SPECS", "quantized_fwd_kernel"]


@triton.jit
def _load_codes(x, i_b, i_h, start, b_rows, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr,
                ROW_MASK: tl.constexpr):  # fmt: skip
    """Load the codes of BLOCK_N keys from ``start``."""
    if TMA:
        tile = x.load([i_b, i_h, start, 0]).reshape(BLOCK_N, WIDTH)
    else:
        p_x = x + tl.cast(start, tl.int64) * WIDTH
        p_x += tl.arange(0, BLOCK_N)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        if ROW_MASK:
            tile = tl.load(p_x, mask=b_rows[:, None], other=0.0)
        else:
            tile = tl.load(p_x)
    return tile


@triton.jit
def _load_values(v, i_b, i_h, start, b_rows, v_s, DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr,
                 PV: tl.constexpr, TMA: tl.constexpr, ROW_MASK: tl.constexpr):  # fmt: skip
    """Load values ``[BLOCK_N, WIDTH]``; 8-bit ones lie transposed, in rows of ``v_s`` keys, and are never masked."""
    if PV == "half":
        tile = _load_half(v, i_b, i_h, start, b_rows, v_s, DIM, WIDTH, BLOCK_N, TMA, ROW_MASK)
    elif TMA:
        tile = v.load([i_b, i_h, 0, start]).reshape(WIDTH, BLOCK_N).T
    else:
        p_v = v + start + tl.arange(0, WIDTH)[:, None] * v_s.to(tl.int64) + tl.arange(0, BLOCK_N)[None, :]
        tile = tl.load(p_v).T
    return tile


@triton.jit
def _load_half(x, i_b, i_h, start, b_rows, stride_s, DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr,
               TMA: tl.constexpr, ROW_MASK: tl.constexpr):  # fmt: skip
    """Load 16-bit keys or values ``[BLOCK_N, WIDTH]``."""
    if TMA:
        tile = x.load([i_b, i_h, start, 0]).reshape(BLOCK_N, WIDTH)
    else:
        o_d = tl.arange(0, WIDTH)
        p_x = x + tl.cast(start, tl.int64) * stride_s + tl.arange(0, BLOCK_N)[:, None] * stride_s + o_d[None, :]
        if ROW_MASK and WIDTH > DIM:
            tile = tl.load(p_x, mask=b_rows[:, None] & (o_d < DIM)[None, :], other=0.0)
        elif ROW_MASK:
            tile = tl.load(p_x, mask=b_rows[:, None], other=0.0)
        elif WIDTH > DIM:
            tile = tl.load(p_x, mask=(o_d < DIM)[None, :], other=0.0)
        else:
            tile = tl.load(p_x)
    return tile


@triton.jit
def _operand_order(weights, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Bring the columns of a tile into the order of the values: a matter of names, nothing moves between threads."""
    parts = weights.reshape(BLOCK_M, BLOCK_N // 16, 2, 4, 2)
    return parts.permute(0, 1, 3, 2, 4).reshape(BLOCK_M, BLOCK_N)


@triton.jit
def _update_float(
    acc, row_max, row_sum, products, factor, v, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FP8: tl.constexpr,
    LIFT: tl.constexpr, TWO_LEVEL: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax with floating-point weights, all of them times ``2 ** LIFT``.

    Logits are ``products * factor``; masked ``products`` are minus infinity.
    """
    new_max = tl.maximum(row_max, tl.max(products, 1) * factor)
    weights = tl.exp2(products * factor[:, None] - (new_max - LIFT)[:, None])
    shrink = tl.exp2(row_max - new_max)
    row_sum = row_sum * shrink + tl.sum(weights, 1)
    weights = weights.to(v.dtype)
    if FP8:
        weights = _operand_order(weights, BLOCK_M, BLOCK_N)
    if FP8 and TWO_LEVEL:
        acc = tl.dot(weights, v, acc * shrink[:, None], max_num_imprecise_acc=BLOCK_N)
    else:
        acc = tl.dot(weights, v, acc * shrink[:, None])
    return acc, new_max, row_sum


@triton.jit
def _update_int8(acc, row_max, row_sum, products, factor, v, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """One step with INT8 weights; see :func:`_update_float`."""
    tile_max = tl.maximum(tl.max(products, 1) * factor, -1.0e30)
    new_max = tl.maximum(row_max, tile_max)
    weights = tl.exp2(products * factor[:, None] - (tile_max - 6.988684686772166)[:, None])  # 0 to 127
    # Adding 1.5 * 2 ** 23 rounds to an integer and leaves it in the lowest byte.
    weights = weights + 12582912.0
    codes = _operand_order(weights.to(tl.int32, bitcast=True).to(tl.int8), BLOCK_M, BLOCK_N)
    shrink = tl.exp2(row_max - new_max)
    gain = tl.exp2(tile_max - new_max) * 0.007874015748031496
    row_sum = row_sum * shrink + tl.sum(weights - 12582912.0, 1) * gain
    acc = acc * shrink[:, None] + tl.dot(codes, v).to(tl.float32) * gain[:, None]
    return acc, new_max, row_sum


@triton.jit
def _update(
    acc, row_max, row_sum, products, factor, v, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PV: tl.constexpr,
    LIFT: tl.constexpr, TWO_LEVEL: tl.constexpr,
):  # fmt: skip
    if PV == "int8":
        acc, row_max, row_sum = _update_int8(acc, row_max, row_sum, products, factor, v, BLOCK_M, BLOCK_N)
    else:
        acc, row_max, row_sum = _update_float(
            acc, row_max, row_sum, products, factor, v, BLOCK_M, BLOCK_N, PV == "fp8", LIFT, TWO_LEVEL
        )
    return acc, row_max, row_sum


@triton.jit
def _load_queries(q, token, m_q, q_s, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """The 16-bit queries ``[BLOCK_M, WIDTH]`` of some tokens."""
    o_d = tl.arange(0, WIDTH)
    return tl.load(q + token[:, None] * q_s + o_d[None, :], mask=m_q[:, None] & (o_d < DIM)[None, :], other=0.0)


# What changes with the number of tokens alone must not compile another kernel.
@triton.jit(
    do_not_specialize=["sq", "sk", "list_b", "list_h", "bits_b", "bits_h", "bias_b", "bias_h"]
)  # fmt: skip
def quantized_fwd_kernel(
    q_codes, q_scale, k, k_scale, v, v_scale, k_mean, q, out, lse, row_start, full, partial, indices, table, head_row,
    pool_k, pool_v, bias, bits, key_valid, scale, sq, sk, q_b, q_h, q_s, v_b, v_h, v_s, out_b, out_h, out_s,
    pool_k_b, pool_k_h, pool_k_s, pool_v_b, pool_v_h, pool_v_s, list_b, list_h, bits_b, bits_h, bias_b, bias_h,
    DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, PV: tl.constexpr, TMA: tl.constexpr, TWO_LEVEL: tl.constexpr,
    EVEN_K: tl.constexpr, HAS_PARTIAL: tl.constexpr, HAS_VALID: tl.constexpr, HAS_ORDER: tl.constexpr,
    HAS_POOLED: tl.constexpr, HAS_MEAN: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    SUB: tl.constexpr = BLOCK_K // BLOCK_N
    LIFT: tl.constexpr = 8.0 if PV == "fp8" else 0.0
    i_m, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    w_h, w_b = i_h.to(tl.int64), i_b.to(tl.int64)
    head = w_b * tl.num_programs(1) + w_h
    i_q = i_m * BLOCK_M // BLOCK_Q
    scale2 = scale * 1.4426950408889634
    kb = tl.cdiv(sk, BLOCK_K)

    o_q = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_q = o_q < sq
    o_n, o_d = tl.arange(0, BLOCK_N), tl.arange(0, WIDTH)
    if HAS_ORDER:
        table += tl.load(head_row + i_h).to(tl.int64) * sq
    q += w_b * q_b + w_h * q_h
    p_codes = q_codes + (head * sq + o_q)[:, None] * WIDTH + o_d[None, :]
    b_q = tl.load(p_codes, mask=m_q[:, None], other=0.0)
    b_scale = tl.load(q_scale + head * sq + o_q, mask=m_q, other=0.0) * scale2
    k_scale += head * kb
    acc = tl.zeros([BLOCK_M, WIDTH], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], -1.0e30, dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    if not TMA:
        k += head * sk * WIDTH
        v += w_b * v_b + w_h * v_h
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

    m_k = o_n >= 0
    # Pooled, masked, plain; the first two with shallow buffers, in which nothing spills and ptxas overlaps the wgmma of all
    # three loops (no C7515).
    if HAS_POOLED:
        token = o_q.to(tl.int64)
        if HAS_ORDER:
            token = tl.load(table + o_q, mask=m_q, other=0).to(tl.int64)
        b_half = _load_queries(q, token, m_q, q_s, DIM, WIDTH)
        shift = tl.zeros([BLOCK_M], dtype=tl.float32)
        if HAS_MEAN:
            b_mean = tl.load(k_mean + head * DIM + o_d, mask=o_d < DIM, other=0.0)
            shift = tl.sum(b_half.to(tl.float32) * b_mean[None, :], 1)
        if not TMA:
            pool_k += w_b * pool_k_b + w_h * pool_k_h
            pool_v += w_b * pool_v_b + w_h * pool_v_h
        bias += w_b * bias_b + w_h * bias_h
        bits += w_b * bits_b + w_h * bits_h + i_q.to(tl.int64) * tl.cdiv(kb, 32)
        o_p = tl.arange(0, BLOCK_P)
        for start in tl.range(0, kb, BLOCK_P, num_stages=2):
            o_k = start + o_p
            word = tl.load(bits + o_k // 32, mask=o_k < kb, other=-1)
            b_bias = tl.load(bias + o_k, mask=o_k < kb, other=float("-inf"))
            m_p = (((word >> (o_k % 32)) & 1) == 0) & (b_bias > float("-inf"))
            b_bias = tl.where(m_p, b_bias / scale, float("-inf"))
            b_k = _load_half(pool_k, i_b, i_h, start, m_p, pool_k_s, DIM, WIDTH, BLOCK_P, TMA, True)
            products = tl.dot(b_half, b_k.T) - shift[:, None] + b_bias[None, :]
            b_v = _load_half(pool_v, i_b, i_h, start, m_p, pool_v_s, DIM, WIDTH, BLOCK_P, TMA, True)
            factor = tl.zeros([BLOCK_M], dtype=tl.float32) + scale2
            acc, row_max, row_sum = _update_float(
                acc, row_max, row_sum, products, factor, b_v, BLOCK_M, BLOCK_P, False, LIFT, False
            )
        if PV != "half":
            acc = acc / tl.load(v_scale + head * WIDTH + o_d)[None, :]

    if HAS_PARTIAL or not EVEN_K:
        for j in tl.range(n_plain * SUB, n_all * SUB, num_stages=2 if PV == "half" else 1):
            i_k = tl.load(indices + j // SUB)
            start = i_k * BLOCK_K + (j % SUB) * BLOCK_N
            m_k = start + o_n < sk
            if HAS_VALID:
                m_k = m_k & (tl.load(key_valid + start + o_n, mask=m_k, other=0) != 0)
            b_k = _load_codes(k, i_b, i_h, start, m_k, WIDTH, BLOCK_N, TMA, True)
            products = tl.where(m_k[None, :], tl.dot(b_q, b_k.T).to(tl.float32), float("-inf"))
            factor = tl.maximum(b_scale * tl.load(k_scale + i_k), 1.0e-37)  # minus infinity times 0 is NaN
            b_v = _load_values(v, i_b, i_h, start, m_k, v_s, DIM, WIDTH, BLOCK_N, PV, TMA, True)
            acc, row_max, row_sum = _update(
                acc, row_max, row_sum, products, factor, b_v, BLOCK_M, BLOCK_N, PV, LIFT, TWO_LEVEL
            )

    for j in tl.range(0, n_plain * SUB):
        i_k = tl.load(indices + j // SUB)
        start = i_k * BLOCK_K + (j % SUB) * BLOCK_N
        factor = b_scale * tl.load(k_scale + i_k)
        if HAS_VALID:
            m_k = tl.load(key_valid + start + o_n) != 0
            factor = tl.maximum(factor, 1.0e-37)
        b_k = _load_codes(k, i_b, i_h, start, m_k, WIDTH, BLOCK_N, TMA, False)
        products = tl.dot(b_q, b_k.T).to(tl.float32)
        if HAS_VALID:
            products = tl.where(m_k[None, :], products, float("-inf"))
        b_v = _load_values(v, i_b, i_h, start, m_k, v_s, DIM, WIDTH, BLOCK_N, PV, TMA, HAS_VALID)
        acc, row_max, row_sum = _update(
            acc, row_max, row_sum, products, factor, b_v, BLOCK_M, BLOCK_N, PV, LIFT, TWO_LEVEL
        )

    token = o_q.to(tl.int64)
    if HAS_ORDER:
        # Read again, under another policy lest the compiler reuse the first: kept over the loops it costs registers.
        token = tl.load(table + o_q, mask=m_q, other=0, eviction_policy="evict_first").to(tl.int64)
    empty = row_sum == 0.0
    scaling = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, row_sum))
    acc = acc * scaling[:, None]
    if PV != "half":
        acc = acc * tl.load(v_scale + head * WIDTH + o_d)[None, :]
    p_out = out + w_b * out_b + w_h * out_h + token[:, None] * out_s + o_d[None, :]
    tl.store(p_out, acc.to(out.dtype.element_ty), mask=m_q[:, None] & (o_d < DIM)[None, :])
    if HAS_LSE:
        value = (row_max + tl.log2(tl.where(empty, 1.0, row_sum)) - LIFT) * 0.6931471805599453
        if HAS_MEAN:
            b_mean = tl.load(k_mean + head * DIM + o_d, mask=o_d < DIM, other=0.0)
            b_half = _load_queries(q, token, m_q, q_s, DIM, WIDTH)
            value += tl.sum(b_half.to(tl.float32) * b_mean[None, :], 1) * scale
        tl.store(lse + head * sq + token, tl.where(empty, float("-inf"), value), mask=m_q)


AOT_SPECS = aot_specs(quantized_fwd_kernel)
