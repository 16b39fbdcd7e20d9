"""Block mass and log-sum-exp in Triton: one product of queries and keys, nothing of size ``[S, S]`` leaves the chip."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common import blocks
from .._launch import capability, describe, split_head_dim
from ..aot_spec import AotSpec
from .reference import query_rows

__all__ = ["AOT_SPECS", "attention_lse_triton", "block_mass_triton"]

_LOG2E = 1.4426950408889634
_TMA_TARGETS = ("sm_90", "sm_100")


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
            b_q0, b_q1, K0, K1, i_b, i_h, start, keys, stride_b, stride_h, stride_s, DIM, D0, D1, BN, TMA, PRECISION, MASKED
        )
        b_p = tl.exp2(b_s * scale2 + b_neg[:, None])
        if MASKED:
            key = start + tl.arange(0, BN)
            visible = (part * BN + tl.arange(0, BN) < BLOCK_K) & (key < keys)
            if HAS_VALID:
                visible = visible & (tl.load(VALID + i_b * stride_valid + key, mask=visible, other=0) != 0)
            b_p = tl.where(visible[None, :], b_p, 0.0)
        b_mass += tl.sum(b_p, 1)
    return b_mass


@triton.jit
def block_mass_kernel(
    Q, K0, K1, LSE, ROWS, TABLE, HEAD, VALID, OUT,
    queries, keys, entries, key_blocks, scale2,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_valid,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, ROWS_EACH: tl.constexpr, PARTS: tl.constexpr,
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
    position = row * BLOCK_Q + within
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
    for j in range(0, whole):
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


@triton.jit
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
            b_q0, b_q1, K0, K1, i_b, i_h, start, keys, stride_kb, stride_kh, stride_ks, DIM, D0, D1, BN, TMA, PRECISION, False
        )
        b_m, b_l = _online(b_s, b_m, b_l, scale2, valid, False)
    for start in range(whole, keys, BN):
        b_s = _logits(
            b_q0, b_q1, K0, K1, i_b, i_h, start, keys, stride_kb, stride_kh, stride_ks, DIM, D0, D1, BN, TMA, PRECISION, True
        )
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


def _tiles(dtype: torch.dtype, width: int) -> tuple[int, int, dict[str, int]]:
    """Rows and keys of a tile and the launch options; two or three programs share a multiprocessor."""
    if dtype == torch.float32:
        # Each operand is held twice, as its TF32 value and the remainder, so the tile must be small.
        return (32 if width <= 128 else 16), 64, {"num_warps": 8, "num_stages": 2}
    if width > 128:
        return 64, 64, {"num_warps": 4, "num_stages": 2}
    return 128, 64, {"num_warps": 4, "num_stages": 2}


def _precision() -> str:
    """How float32 is multiplied; AMD's compiler knows no split into TF32."""
    return "ieee" if torch.version.hip is not None else "tf32x3"


def _keys(k: Tensor, rows: int, widths: tuple[int, int]) -> tuple[object, object, bool]:
    """The key arguments of a launch: two TMA descriptors on Hopper and later, the tensor twice elsewhere."""
    if capability(k) >= 90:
        first = describe(k, rows, widths[0])
        if first is not None:
            return first, describe(k, rows, widths[1]) if widths[1] else first, True
    return k, k, False


def block_mass_triton(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
    rows: Tensor | None,
    table: Tensor | None,
    head: Tensor | None,
    key_valid: Tensor | None,
) -> Tensor:
    """Softmax mass per block; see :func:`dit_accel_kernels.block_mass` for the arguments."""
    batch, heads, queries, dim = q.shape
    keys = k.shape[2]
    widths = split_head_dim(dim)
    bm, bn, options = _tiles(q.dtype, sum(widths))
    bn = min(bn, max(16, triton.next_power_of_2(block_k)))
    rows_each = min(bm, triton.next_power_of_2(block_q))
    parts = blocks(block_q, bm)
    count = blocks(queries, block_q) if rows is None else rows.shape[0]
    key_blocks = blocks(keys, block_k)
    out = torch.empty(batch, heads, count * parts, key_blocks, dtype=torch.float32, device=q.device)
    k0, k1, tma = _keys(k, bn, widths)
    grid = (blocks(count * parts, bm // rows_each), heads, batch)
    block_mass_kernel[grid](
        q, k0, k1, lse.contiguous(),
        q if rows is None else rows.int().contiguous(),
        q if table is None else table.contiguous(),
        q if head is None else head.contiguous(),
        q if key_valid is None else key_valid.contiguous().view(torch.uint8),
        out, queries, keys, count * parts, key_blocks, scale * _LOG2E,
        *q.stride()[:3], *k.stride()[:3], keys,
        BLOCK_Q=block_q, BLOCK_K=block_k, DIM=dim, D0=widths[0], D1=widths[1], BM=bm, BN=bn,
        ROWS_EACH=rows_each, PARTS=parts, HAS_ROWS=rows is not None,
        HAS_ORDER=table is not None and head is not None, HAS_VALID=key_valid is not None, TMA=tma, PRECISION=_precision(),
        **options,
    )  # fmt: skip
    if parts == 1:
        return out
    # A query block larger than a tile comes back as sums over its parts.
    if rows is None:
        rows = torch.arange(count, device=q.device)
    token, inside = query_rows(rows, block_q, queries, table, head)
    row_lse = lse.gather(2, token.expand(heads, -1)[None].expand(batch, -1, -1))
    counted = (inside & (row_lse > float("-inf"))).view(batch, heads, count, block_q).sum(3)
    return out.view(batch, heads, count, parts, key_blocks).sum(3) / counted.clamp(min=1)[..., None]


def attention_lse_triton(q: Tensor, k: Tensor, scale: float, key_valid: Tensor | None) -> Tensor:
    """Natural-log normaliser of each query; see :func:`dit_accel_kernels.attention_lse` for the arguments."""
    batch, heads, queries, dim = q.shape
    keys = k.shape[2]
    widths = split_head_dim(dim)
    bm, bn, options = _tiles(q.dtype, sum(widths))
    out = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    k0, k1, tma = _keys(k, bn, widths)
    attention_lse_kernel[(blocks(queries, bm), heads, batch)](
        q, k0, k1, q if key_valid is None else key_valid.contiguous().view(torch.uint8), out,
        queries, keys, scale * _LOG2E, *q.stride()[:3], *k.stride()[:3], keys,
        DIM=dim, D0=widths[0], D1=widths[1], BM=bm, BN=bn, HAS_VALID=key_valid is not None, TMA=tma, PRECISION=_precision(),
        **options,
    )  # fmt: skip
    return out


def _specs(dim: int, dtype: str, features: bool, targets: tuple[str, ...]) -> list[AotSpec]:
    """Both kernels for one head size; ``features`` turns rows, order and ``key_valid`` on."""
    tma, amd = targets == _TMA_TARGETS, targets == ("gfx942",)
    widths = split_head_dim(dim)
    bm, bn, options = _tiles(torch.float32 if dtype == "fp32" else torch.bfloat16, sum(widths))
    strides = ("qb", "qh", "qs", "kb", "kh", "ks")
    pointers = {name: f"*{dtype}" for name in ("Q", "K0", "K1")}
    if tma:
        pointers["K0"] = f"tensordesc<{dtype}[1, 1, {bn}, {widths[0]}]>"
        pointers["K1"] = f"tensordesc<{dtype}[1, 1, {bn}, {widths[1] or widths[0]}]>"
    tail = {f"stride_{name}": "i32" for name in strides} | {"stride_valid": "i32"}
    shape = {"DIM": dim, "D0": widths[0], "D1": widths[1], "BM": bm, "BN": bn, "HAS_VALID": features, "TMA": tma}
    shape["PRECISION"] = "ieee" if amd else "tf32x3"
    mass = shape | {"BLOCK_Q": 64, "BLOCK_K": 64, "ROWS_EACH": min(bm, 64), "PARTS": max(1, 64 // bm)}
    mass |= {"HAS_ROWS": features, "HAS_ORDER": features}
    ints = {"LSE": "*fp32", "ROWS": "*i32", "TABLE": "*i32", "HEAD": "*i32", "VALID": "*u8", "OUT": "*fp32"}
    counts = {name: "i32" for name in ("queries", "keys", "entries", "key_blocks")} | {"scale2": "fp32"}
    mass_signature = pointers | ints | counts | tail
    lse_signature = pointers | {"VALID": "*u8", "OUT": "*fp32", "queries": "i32", "keys": "i32", "scale2": "fp32"} | tail
    suffix = f"d{dim}/{dtype}{'/tma' if tma else '/amd' if amd else ''}{'/order+valid' if features else ''}"
    aligned = tuple(name for name in ("Q", "K0", "K1") if pointers[name].startswith("*"))
    aligned += tuple(f"stride_{name}" for name in strides)
    return [
        AotSpec(
            name=f"{name}/{suffix}",
            fn=fn,
            signature=signature | {key: "constexpr" for key in constexprs},
            constexprs=constexprs,
            options=options,
            targets=targets,
            max_spill_bytes=1024 if dtype == "fp32" else 0,
            divisible_by_16=aligned,
        )
        for name, fn, signature, constexprs in (
            ("block_mass", block_mass_kernel, mass_signature, mass),
            ("attention_lse", attention_lse_kernel, lse_signature, shape),
        )
    ]


AOT_SPECS = [
    spec
    for dim, dtype, features in (
        (128, "bf16", False),
        (72, "bf16", True),
        (64, "fp16", False),
        (256, "bf16", False),
        (128, "fp32", True),
    )
    for targets in (("sm_80", "sm_89"), _TMA_TARGETS, ("gfx942",))
    for spec in _specs(dim, dtype, features, targets)
]
