"""Block mass and log-sum-exp in Triton: one product of queries and keys, nothing of size ``[S, S]`` leaves the chip."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["attention_lse_kernel", "block_mass_kernel"]


@triton.jit
def _query_tile(
    Q, i_b, i_h, token, valid, stride_b, stride_h, stride_s, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr
):
    channel = FIRST + tl.arange(0, WIDTH)
    base = Q + i_b * stride_b + i_h * stride_h
    # [BM, WIDTH]
    p_q = base + token.to(tl.int64)[:, None] * stride_s + channel[None, :]
    return tl.load(p_q, mask=valid[:, None] & (channel[None, :] < DIM), other=0.0)


@triton.jit
def _key_tile(
    K, i_b, i_h, start, keys, stride_b, stride_h, stride_s,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, BN: tl.constexpr,
    TMA: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    if TMA:
        b_k = K.load([i_b.to(tl.int32), i_h.to(tl.int32), start, FIRST]).reshape(BN, WIDTH)
    else:
        channel = FIRST + tl.arange(0, WIDTH)
        key = start + tl.arange(0, BN)
        base = K + i_b * stride_b + i_h * stride_h
        # [BN, WIDTH]
        p_k = base + key.to(tl.int64)[:, None] * stride_s + channel[None, :]
        if MASKED:
            b_k = tl.load(p_k, mask=(key < keys)[:, None] & (channel[None, :] < DIM), other=0.0)
        elif FIRST + WIDTH > DIM:
            b_k = tl.load(p_k, mask=channel[None, :] < DIM, other=0.0)
        else:
            b_k = tl.load(p_k)
    return b_k


@triton.jit
def _logits(
    b_q0, b_q1, K0, K1, i_b, i_h, start, keys, stride_b, stride_h, stride_s,
    DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BN: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    # Float32 in three TF32 products: a planner that compares masses of 1e-3 must not see the rounding of one.
    b_k = _key_tile(K0, i_b, i_h, start, keys, stride_b, stride_h, stride_s, 0, D0, DIM, BN, TMA, MASKED)
    b_s = tl.dot(b_q0, b_k.T, input_precision=PRECISION)
    if D1 > 0:
        b_k1 = _key_tile(K1, i_b, i_h, start, keys, stride_b, stride_h, stride_s, D0, D1, DIM, BN, TMA, MASKED)
        b_s = tl.dot(b_q1, b_k1.T, b_s, input_precision=PRECISION)
    return b_s


@triton.jit
def _row_mass(
    b_q0, b_q1, b_neg, K0, K1, VALID, i_b, i_h, j, keys, scale2, stride_b, stride_h, stride_s, stride_valid,
    DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr, HAS_VALID: tl.constexpr,
):  # fmt: skip
    """Mass that each of BM queries puts on key block j: float32 [BM]."""
    b_mass = tl.zeros([BM], dtype=tl.float32)
    for part in tl.static_range((BLOCK_K + BN - 1) // BN):
        start = j * BLOCK_K + part * BN
        b_s = _logits(
            b_q0, b_q1, K0, K1, i_b, i_h, start, keys, stride_b, stride_h, stride_s,
            DIM, D0, D1, BN, TMA, PRECISION, MASKED,
        )  # fmt: skip
        b_p = tl.exp2(b_s * scale2 + b_neg[:, None])
        if MASKED:
            key = start + tl.arange(0, BN)
            visible = (part * BN + tl.arange(0, BN) < BLOCK_K) & (key < keys)
            if HAS_VALID:
                visible = visible & (tl.load(VALID + i_b * stride_valid + key, mask=visible, other=0) != 0)
            b_p = tl.where(visible[None, :], b_p, 0.0)
        b_mass += tl.sum(b_p, 1)
    return b_mass


# Counts are not specialised: another number of tokens must not compile another kernel.
@triton.jit(do_not_specialize=["queries", "keys", "entries", "key_blocks", "stride_valid"])
def block_mass_kernel(
    Q, K0, K1, LSE, ROWS, TABLE, HEAD, VALID, OUT,
    queries, keys, entries, key_blocks, scale2,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_valid,
    BLOCK_Q: tl.constexpr, STEP: tl.constexpr, BLOCK_K: tl.constexpr, DIM: tl.constexpr, D0: tl.constexpr,
    D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ROWS_EACH: tl.constexpr, PARTS: tl.constexpr,
    HAS_ROWS: tl.constexpr, HAS_ORDER: tl.constexpr, HAS_VALID: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BM // ROWS_EACH entries (query blocks, or PARTS-ths of one) against all keys of a head."""
    i_h, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1)
    EACH: tl.constexpr = BM // ROWS_EACH
    slot = tl.program_id(0) * EACH + tl.arange(0, BM) // ROWS_EACH
    within = tl.arange(0, BM) % ROWS_EACH + (slot % PARTS) * ROWS_EACH
    row = slot // PARTS
    if HAS_ROWS:
        row = tl.load(ROWS + row, mask=slot < entries, other=0)
    position = (row * BLOCK_Q + within) * STEP
    valid = (slot < entries) & (within < BLOCK_Q) & (position < queries)
    token = position
    if HAS_ORDER:
        i_table = tl.load(HEAD + i_h).to(tl.int64)
        token = tl.load(TABLE + i_table * queries + position, mask=valid, other=0)
    # A row that sees no key has lse = -inf; it says nothing about where the mass is.
    b_lse = tl.load(LSE + (i_b * heads + i_h) * queries + token, mask=valid, other=float("-inf"))
    counted = valid & (b_lse > float("-inf"))
    b_neg = tl.where(counted, b_lse * -1.4426950408889634, float("-inf"))
    b_q0 = _query_tile(Q, i_b, i_h, token, valid, stride_qb, stride_qh, stride_qs, 0, D0, DIM)
    b_q1 = b_q0
    if D1 > 0:
        b_q1 = _query_tile(Q, i_b, i_h, token, valid, stride_qb, stride_qh, stride_qs, D0, D1, DIM)
    b_weight = 1.0 / tl.maximum(tl.sum(tl.reshape(counted.to(tl.float32), EACH, ROWS_EACH), 1), 1.0)
    if PARTS > 1:
        b_weight = tl.full([EACH], 1.0, tl.float32)

    entry = tl.program_id(0) * EACH + tl.arange(0, EACH)
    p_out = OUT + ((i_b * heads + i_h) * entries + entry) * key_blocks
    # Only the last key block can be ragged, so the loop over whole ones needs no mask.
    whole = keys // BLOCK_K
    for j in range(whole):
        b_mass = _row_mass(
            b_q0, b_q1, b_neg, K0, K1, VALID, i_b, i_h, j, keys, scale2, stride_kb, stride_kh, stride_ks, stride_valid,
            DIM, D0, D1, BLOCK_K, BM, BN, TMA, PRECISION, HAS_VALID or BLOCK_K % BN != 0, HAS_VALID,
        )  # fmt: skip
        b_sum = tl.sum(tl.reshape(b_mass, EACH, ROWS_EACH), 1)
        tl.store(p_out + j, b_sum * b_weight, mask=entry < entries)
    if whole < key_blocks:
        b_mass = _row_mass(
            b_q0, b_q1, b_neg, K0, K1, VALID, i_b, i_h, whole, keys, scale2, stride_kb, stride_kh, stride_ks, stride_valid,
            DIM, D0, D1, BLOCK_K, BM, BN, TMA, PRECISION, True, HAS_VALID,
        )  # fmt: skip
        b_sum = tl.sum(tl.reshape(b_mass, EACH, ROWS_EACH), 1)
        tl.store(p_out + whole, b_sum * b_weight, mask=entry < entries)


@triton.jit
def _online(b_s, b_m, b_l, scale2, visible, MASKED: tl.constexpr):
    b_s = b_s * scale2
    if MASKED:
        b_s = tl.where(visible[None, :], b_s, float("-inf"))
    b_new = tl.maximum(b_m, tl.max(b_s, 1))
    # With no key seen yet both maxima are -inf, and their difference is not 0 but NaN.
    b_safe = tl.where(b_new > float("-inf"), b_new, 0.0)
    b_l = b_l * tl.exp2(b_m - b_safe) + tl.sum(tl.exp2(b_s - b_safe[:, None]), 1)
    return b_new, b_l


@triton.jit(do_not_specialize=["queries", "keys", "stride_valid"])
def attention_lse_kernel(
    Q, K0, K1, VALID, OUT, queries, keys, scale2,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_valid,
    DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    HAS_VALID: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BM queries of a head against all its keys."""
    i_h, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * BM + tl.arange(0, BM)
    valid = token < queries
    b_q0 = _query_tile(Q, i_b, i_h, token, valid, stride_qb, stride_qh, stride_qs, 0, D0, DIM)
    b_q1 = b_q0
    if D1 > 0:
        b_q1 = _query_tile(Q, i_b, i_h, token, valid, stride_qb, stride_qh, stride_qs, D0, D1, DIM)
    b_m = tl.full([BM], float("-inf"), tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    whole = keys // BN * BN
    if HAS_VALID:
        whole = 0
    for start in range(0, whole, BN):
        b_s = _logits(
            b_q0, b_q1, K0, K1, i_b, i_h, start, keys, stride_kb, stride_kh, stride_ks,
            DIM, D0, D1, BN, TMA, PRECISION, False,
        )  # fmt: skip
        b_m, b_l = _online(b_s, b_m, b_l, scale2, valid, False)
    for start in range(whole, keys, BN):
        b_s = _logits(
            b_q0, b_q1, K0, K1, i_b, i_h, start, keys, stride_kb, stride_kh, stride_ks,
            DIM, D0, D1, BN, TMA, PRECISION, True,
        )  # fmt: skip
        key = start + tl.arange(0, BN)
        visible = key < keys
        if HAS_VALID:
            visible = visible & (tl.load(VALID + i_b * stride_valid + key, mask=visible, other=0) != 0)
        b_m, b_l = _online(b_s, b_m, b_l, scale2, visible, True)
    # log2(0) = -inf is the answer for a row that saw nothing.
    b_lse = (b_m + tl.log2(b_l)) * 0.6931471805599453
    b_lse = tl.where(b_l > 0.0, b_lse, float("-inf"))
    p_out = OUT + (i_b * tl.num_programs(1) + i_h) * queries + token
    tl.store(p_out, b_lse, mask=valid)
