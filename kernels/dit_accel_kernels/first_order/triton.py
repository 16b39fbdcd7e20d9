"""First-order terms in Triton: weights of key blocks, covariances, and what is added to outputs."""

# Kernels have no types.
# mypy: disallow_untyped_defs=False, disallow_incomplete_defs=False
# mypy: disallow_untyped_decorators=False, disallow_untyped_calls=False

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["apply_kernel", "covariance_kernel", "weights_kernel"]

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _middle(LSE, table, o_m, tokens, BLOCK: tl.constexpr, STEP: tl.constexpr, HAS_ORDER: tl.constexpr):
    """Mean log-sum-exp of the queries of each block, ``[BLOCK_M]``."""
    total = o_m.to(tl.float32) * 0.0
    for part in range(0, BLOCK, STEP):
        within = part + tl.arange(0, STEP)
        token = o_m[:, None] * BLOCK + within[None, :]
        inside = (within < BLOCK)[None, :] & (token < tokens)
        if HAS_ORDER:
            token = tl.load(table + token, mask=inside, other=0)
        total += tl.sum(tl.load(LSE + token, mask=inside, other=0.0), 1)
    return total / tl.maximum(tl.minimum(tokens - o_m * BLOCK, BLOCK), 1)


# Numbers of tokens are not specialised: another one must not compile another kernel.
@triton.jit(do_not_specialize=["first", "heads", "tokens", "rows", "kb", "bits_b", "bits_h", "bias_b", "bias_h"])
def weights_kernel(
    MEAN, LSE, TABLE, HEAD, POOL_K, BIAS, BITS, MIDDLE, WEIGHT, CENTRE, scale, first, heads, tokens, rows, kb, pitch,
    bits_b, bits_h, bias_b, bias_h,
    BLOCK: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    STEP: tl.constexpr, HAS_ORDER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M mean queries of one head. Weights of the blocks that each skips, and its mean skipped key.

    The mean log-sum-exp of a block that has a query which is not finite is infinite: nothing is weighted there.
    """
    i_m, here = tl.program_id(0), tl.program_id(1).to(tl.int64)
    plane = first + here
    i_b, i_h = plane // heads, plane % heads
    o_m, o_n, channel = i_m * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, WIDTH)
    m_m = o_m < rows
    row = plane * rows + o_m
    m_row = m_m[:, None] & (channel[None, :] < DIM)
    b_q = tl.load(MEAN + row[:, None] * DIM + channel[None, :], mask=m_row, other=0.0)
    table = TABLE
    if HAS_ORDER:
        table += tl.load(HEAD + i_h).to(tl.int64) * tokens
    b_middle = _middle(LSE + plane * tokens, table, o_m, tokens, BLOCK, STEP, HAS_ORDER)
    tame = tl.sum((tl.abs(b_q.to(tl.float32)) < float("inf")).to(tl.int32), 1) == WIDTH  # NaN compares false as well
    tame = tame & (tl.abs(b_middle) < float("inf")) & m_m
    b_q = tl.where(tame[:, None], b_q, 0.0)
    tl.store(MIDDLE + row, tl.where(tame, b_middle, float("inf")), mask=m_m)
    middle2 = tl.where(tame, b_middle, 0.0) * _LOG2_E
    scale2 = scale * _LOG2_E
    p_bits = BITS + i_b * bits_b + i_h * bits_h + o_m.to(tl.int64) * tl.cdiv(kb, 32)
    p_bias = BIAS + i_b * bias_b + i_h * bias_h
    p_weight = WEIGHT + (here * rows + o_m)[:, None] * pitch
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_centre = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    for start in range(0, kb, BLOCK_N):
        block = start + o_n
        b_bias = tl.load(p_bias + block, mask=block < kb, other=float("-inf"))
        inside = b_bias > float("-inf")
        # A tile lies in one or two words of a row.
        low = tl.load(p_bits + start // 32, mask=m_m, other=-1)
        high = tl.load(p_bits + start // 32 + 1, mask=m_m & ((start // 32 + 1) * 32 < kb), other=-1)
        word = tl.where((start % 32 + o_n < 32)[None, :], low[:, None], high[:, None])
        skipped = (((word >> (block % 32)[None, :]) & 1) == 0) & inside[None, :] & tame[:, None]
        p_k = POOL_K + (plane * kb + block)[:, None] * DIM + channel[None, :]
        b_k = tl.load(p_k, mask=inside[:, None] & (channel[None, :] < DIM), other=0.0)
        logits = tl.dot(b_q, b_k.T, input_precision=PRECISION) * scale2 + (b_bias * _LOG2_E)[None, :]
        b_w = tl.where(skipped, tl.exp2(logits - middle2[:, None]), 0.0)
        b_sum += tl.sum(b_w, 1)
        b_centre = tl.dot(b_w.to(b_k.dtype), b_k, b_centre, input_precision=PRECISION)
        m_weight = m_m[:, None] & (block < kb)[None, :]
        tl.store(p_weight + block[None, :], (b_w * scale).to(WEIGHT.dtype.element_ty), mask=m_weight)
    share = tl.where(b_sum > 1.0e-30, scale / tl.maximum(b_sum, 1.0e-30), 0.0)
    tl.store(CENTRE + row[:, None] * DIM + channel[None, :], b_centre * share[:, None], mask=m_row)


@triton.jit(do_not_specialize=["first", "heads", "tokens", "kb", "turn"])
def covariance_kernel(
    K, V, POOL_K, VALID, COV, first, heads, tokens, kb, turn, k_b, k_h, k_s, v_b, v_h, v_s,
    BLOCK: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr, SPAN: tl.constexpr,
    STEP: tl.constexpr, HAS_VALID: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one block of keys of one head, SPAN of PART channels of its values: mean of ``b_n v_n``."""
    i_block, here = tl.program_id(0), tl.program_id(1).to(tl.int64)
    plane = first + here
    i_b, i_h = plane // heads, plane % heads
    channel, o_v = tl.arange(0, WIDTH), tl.program_id(2) * SPAN + tl.arange(0, SPAN)
    first_channel = turn * PART  # of a constant: so the compiler knows that tokens can be read in large pieces
    m_v = (o_v < PART) & (first_channel + o_v < DIM)
    b_mean = tl.load(POOL_K + (plane * kb + i_block) * DIM + channel, mask=channel < DIM, other=0.0).to(tl.float32)
    b_sum = tl.zeros([WIDTH, SPAN], tl.float32)
    b_count = tl.zeros([STEP], tl.float32)
    for part in range(0, BLOCK, STEP):
        within = part + tl.arange(0, STEP)
        token = i_block * BLOCK + within
        inside = (within < BLOCK) & (token < tokens)
        if HAS_VALID:
            inside = inside & (tl.load(VALID + i_b * tokens + token, mask=inside, other=0) != 0)
        token = token.to(tl.int64)
        p_k = K + i_b * k_b + i_h * k_h + token[:, None] * k_s + channel[None, :]
        p_v = V + i_b * v_b + i_h * v_h + token[:, None] * v_s + first_channel + o_v[None, :]
        b_k = tl.load(p_k, mask=inside[:, None] & (channel[None, :] < DIM), other=0.0)
        b_v = tl.load(p_v, mask=inside[:, None] & m_v[None, :], other=0.0)
        apart = tl.where(inside[:, None], b_k.to(tl.float32) - b_mean[None, :], 0.0).to(COV.dtype.element_ty)
        b_sum = tl.dot(apart.T, b_v.to(COV.dtype.element_ty), b_sum, input_precision=PRECISION)
        b_count += inside.to(tl.float32)
    b_sum = b_sum / tl.maximum(tl.sum(b_count, 0), 1.0)
    p_out = COV + ((here * kb + i_block) * DIM + channel[:, None]) * PART + o_v[None, :]
    tl.store(p_out, b_sum.to(COV.dtype.element_ty), mask=(channel[:, None] < DIM) & (o_v < PART)[None, :])


@triton.jit(do_not_specialize=["first", "heads", "tokens", "rows", "turn"])
def apply_kernel(
    Q, LSE, TABLE, HEAD, MEAN, MIDDLE, CENTRE, LACKS, MATRIX, MORE, OUT, first, heads, tokens, rows, turn,
    q_b, q_h, q_s, m_b, m_h, m_s, o_b, o_h, o_s,
    BLOCK: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr, SPAN: tl.constexpr,
    BLOCK_M: tl.constexpr, HAS_ORDER: tl.constexpr, HAS_MORE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of a block of one head, to SPAN of PART channels of whose outputs all is added."""
    parts: tl.constexpr = (BLOCK + BLOCK_M - 1) // BLOCK_M
    i_block, here = tl.program_id(0) // parts, tl.program_id(1).to(tl.int64)
    channel, o_v = tl.arange(0, WIDTH), tl.program_id(2) * SPAN + tl.arange(0, SPAN)
    first_channel = turn * PART
    m_c, m_v = channel < DIM, (o_v < PART) & (first_channel + o_v < DIM)
    p_m = MATRIX + ((here * rows + i_block) * DIM + channel[:, None]) * PART + o_v[None, :]
    b_m = tl.load(p_m, mask=m_c[:, None] & (o_v < PART)[None, :], other=0.0)
    plane = first + here
    i_b, i_h = plane // heads, plane % heads
    within = tl.program_id(0) % parts * BLOCK_M + tl.arange(0, BLOCK_M)
    token = i_block * BLOCK + within
    inside = (within < BLOCK) & (token < tokens)
    if HAS_ORDER:
        token = tl.load(TABLE + tl.load(HEAD + i_h).to(tl.int64) * tokens + token, mask=inside, other=0)
    token = token.to(tl.int64)
    p_q = Q + i_b * q_b + i_h * q_h + token[:, None] * q_s + channel[None, :]
    b_q = tl.load(p_q, mask=inside[:, None] & m_c[None, :], other=0.0)
    p_out = OUT + i_b * o_b + i_h * o_h + token[:, None] * o_s + first_channel + o_v[None, :]
    m_out = inside[:, None] & m_v[None, :]
    b_out = tl.load(p_out, mask=m_out, other=0.0)  # before the product, lest it waits for that
    row = plane * rows + i_block
    middle = tl.load(MIDDLE + row)
    b_mean = tl.load(MEAN + row * DIM + channel, mask=m_c, other=0.0).to(tl.float32)
    b_mean = tl.where(middle < float("inf"), b_mean, 0.0)
    b_centre = tl.load(CENTRE + row * DIM + channel, mask=m_c, other=0.0)
    b_lacks = tl.load(LACKS + row * DIM + first_channel + o_v, mask=m_v, other=0.0).to(tl.float32)
    b_lse = tl.load(LSE + plane * tokens + token, mask=inside, other=0.0)
    apart = b_q.to(tl.float32) - b_mean[None, :]
    moved = middle - b_lse + tl.sum(apart * b_centre[None, :], 1)
    share = tl.exp2(tl.where(moved > 0.0, 0.0, moved) * _LOG2_E)  # NaN stays
    found = tl.dot(apart.to(MATRIX.dtype.element_ty), b_m, input_precision=PRECISION)
    found = (found + b_lacks[None, :]) * share[:, None]
    if HAS_MORE:
        p_more = MORE + i_b * m_b + i_h * m_h + token[:, None] * m_s + first_channel + o_v[None, :]
        found += tl.load(p_more, mask=m_out, other=0.0).to(tl.float32)
    tl.store(p_out, (b_out.to(tl.float32) + found).to(OUT.dtype.element_ty), mask=m_out)
