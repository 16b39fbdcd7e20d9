"""The correction at mean queries in Triton: means, one pass over all keys, and the sum."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common import blocks, next_power_of_2
from .._launch import capability, launch
from ..aot_spec import AotSpec
from ..types import Pooled

__all__ = ["AOT_SPECS", "add_rows_triton", "mean_queries_triton", "pooled_keys", "residual_triton", "step"]

# Tokens of a block that a program handles at a time: many loads at once, but no more than registers hold.
_MEAN_ROWS, _ADD_ROWS = 128, 32


# Numbers of tokens are not specialised: another one must not compile another kernel.
@triton.jit(do_not_specialize=["tokens", "count"])
def block_rows_kernel(
    X, ROWS_OF, TABLE, HEAD, tokens, count, stride_b, stride_h, stride_s,
    BLOCK: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr, HAS_ORDER: tl.constexpr,
    ADD: tl.constexpr,
):  # fmt: skip
    """One program: one block of one head. Writes its mean to ``ROWS_OF``, or with ``ADD`` adds that row to its tokens."""
    i_block, i_h, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, WIDTH)
    base = X + i_b * stride_b + i_h * stride_h
    p_row = ROWS_OF + ((i_b * tl.num_programs(1) + i_h) * count + i_block) * DIM + channel
    if HAS_ORDER:
        TABLE += tl.load(HEAD + i_h).to(tl.int64) * tokens
    b_row = tl.zeros([WIDTH], tl.float32)
    if ADD:
        b_row = tl.load(p_row, mask=channel < DIM, other=0.0).to(tl.float32)
    for part in range(0, BLOCK, STEP):
        within = part + tl.arange(0, STEP)
        token = i_block * BLOCK + within
        inside = (within < BLOCK) & (token < tokens)
        if HAS_ORDER:
            token = tl.load(TABLE + token, mask=inside, other=0)
        # [STEP, WIDTH]
        p_x = base + token.to(tl.int64)[:, None] * stride_s + channel[None, :]
        m_x = inside[:, None] & (channel[None, :] < DIM)
        b_x = tl.load(p_x, mask=m_x, other=0.0).to(tl.float32)
        if ADD:
            tl.store(p_x, (b_x + b_row[None, :]).to(X.dtype.element_ty), mask=m_x)
        else:
            b_row += tl.sum(b_x, 0)
    if not ADD:
        size = tl.minimum(tokens - i_block * BLOCK, BLOCK)
        tl.store(p_row, (b_row / size).to(ROWS_OF.dtype.element_ty), mask=channel < DIM)


def _block_rows(x: Tensor, rows: Tensor, table: Tensor | None, head: Tensor | None, block: int, *, add: bool) -> None:
    batch, heads, tokens, dim = x.shape
    count = blocks(tokens, block)
    rows_at_once = _ADD_ROWS if add else _MEAN_ROWS
    with torch.cuda.device_of(x):
        launch(block_rows_kernel, (count, heads, batch))(
            x, rows, x if table is None else table, x if head is None else head, tokens, count, *x.stride()[:3],
            BLOCK=block, DIM=dim, WIDTH=next_power_of_2(dim), STEP=min(rows_at_once, next_power_of_2(block)),
            HAS_ORDER=table is not None, ADD=add, num_warps=4,
        )  # fmt: skip


def mean_queries_triton(query: Tensor, table: Tensor | None, head: Tensor | None, block: int) -> Tensor:
    """Mean of the queries of each block, contiguous ``[B, H, Qb, D]``."""
    batch, heads, tokens, dim = query.shape
    means = torch.empty(batch, heads, blocks(tokens, block), dim, dtype=query.dtype, device=query.device)
    _block_rows(query, means, table, head, block, add=False)
    return means


def add_rows_triton(out: Tensor, rows: Tensor, table: Tensor | None, head: Tensor | None, block: int) -> None:
    """See :func:`dit_accel_kernels.query_means.add_query_means_`."""
    _block_rows(out, rows, table, head, block, add=True)


@triton.jit
def _rows_of(X, first, stride_s, inside, channel, DIM: tl.constexpr, SPAN: tl.constexpr, MASKED: tl.constexpr):
    """Load ``SPAN`` rows from ``first``, with ``MASKED`` those that ``inside`` marks."""
    p_x = X + tl.cast(first, tl.int64) * stride_s + tl.arange(0, SPAN)[:, None] * stride_s + channel[None, :]
    if MASKED:
        return tl.load(p_x, mask=inside[:, None] & (channel[None, :] < DIM), other=0.0)
    return tl.load(p_x)


@triton.jit
def _keys(
    b_q, K, V, start, k_s, v_s, inside, p_bits, m_m, channel, top, all_sum, kept_sum, all_acc, kept_acc, scale2,
    BLOCK_K: tl.constexpr, DIM: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys. It lies within one block, so that a row has all of it or none: one product serves both sums."""
    b_k = _rows_of(K, start, k_s, inside, channel, DIM, BLOCK_N, MASKED)
    logits = tl.dot(b_q, b_k.T, input_precision=PRECISION) * scale2
    if MASKED:
        logits = tl.where(inside[None, :], logits, float("-inf"))
    block = start // BLOCK_K
    word = tl.load(p_bits + block // 32, mask=m_m, other=0)
    exact = ((word >> (block % 32)) & 1).to(tl.float32)  # [BLOCK_M]
    new_top = tl.maximum(top, tl.max(logits, 1))
    shrink = tl.exp2(top - new_top)
    weights = tl.exp2(logits - new_top[:, None])
    here = tl.sum(weights, 1)
    b_v = _rows_of(V, start, v_s, inside, channel, DIM, BLOCK_N, MASKED)
    part = tl.dot(weights.to(b_v.dtype), b_v, input_precision=PRECISION)  # [BLOCK_M, WIDTH]
    all_acc = all_acc * shrink[:, None] + part
    kept_acc = kept_acc * shrink[:, None] + part * exact[:, None]
    return new_top, all_sum * shrink + here, kept_sum * shrink + here * exact, all_acc, kept_acc


@triton.jit
def pooled_keys(
    b_q, POOL_K, POOL_V, BIAS, p_bits, m_m, kb, top, kept_sum, kept_acc, scale2, channel,
    DIM: tl.constexpr, BLOCK_N: tl.constexpr, HIDDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the pooled keys of skipped blocks to what is kept, relative to ``top``; HIDDEN: some have no keys at all."""
    o_n = tl.arange(0, BLOCK_N)
    for start in range(0, kb, BLOCK_N):
        inside = start + o_n < kb
        b_bias = tl.load(BIAS + start + o_n, mask=inside, other=float("-inf"))
        if HIDDEN:  # else loads do not wait for the bias
            inside = b_bias > float("-inf")
        # A tile lies in one or two words of a row; pointers for each of its elements would not fit the registers.
        low = tl.load(p_bits + start // 32, mask=m_m, other=-1)
        high = tl.load(p_bits + start // 32 + 1, mask=m_m & ((start // 32 + 1) * 32 < kb), other=-1)
        word = tl.where((start % 32 + o_n < 32)[None, :], low[:, None], high[:, None])
        skipped = (((word >> ((start + o_n) % 32)[None, :]) & 1) == 0) & inside[None, :]  # [BLOCK_M, BLOCK_N]
        b_k = _rows_of(POOL_K, start, DIM, inside, channel, DIM, BLOCK_N, True)
        logits = tl.dot(b_q, b_k.T, input_precision=PRECISION) * scale2 + (b_bias * 1.4426950408889634)[None, :]
        weights = tl.where(skipped, tl.exp2(logits - top[:, None]), 0.0)
        kept_sum += tl.sum(weights, 1)
        b_v = _rows_of(POOL_V, start, DIM, inside, channel, DIM, BLOCK_N, True)
        kept_acc = tl.dot(weights.to(b_v.dtype), b_v, kept_acc, input_precision=PRECISION)
    return kept_sum, kept_acc


@triton.jit(do_not_specialize=["rows", "sk", "bits_b", "bits_h", "bias_b", "bias_h"])
def residual_kernel(
    MEANS, K, V, POOL_K, POOL_V, BIAS, BITS, VALID, OUT, scale, rows, sk,
    k_b, k_h, k_s, v_b, v_h, v_s, bits_b, bits_h, bias_b, bias_h,
    BLOCK_K: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_VALID: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M mean queries against all keys, with two sums: over all of them and over those that are exact.

    Both are relative to the largest logit of all keys. A pooled logit does not exceed the largest of its block by more
    than the log of its count, so the pooled keys come last and change the maximum no more.
    """
    i_m, i_h, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    kb = tl.cdiv(sk, BLOCK_K)
    plane = i_b * tl.num_programs(1) + i_h
    o_m, o_n, channel = i_m * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, WIDTH)
    m_m = o_m < rows
    scale2 = scale * 1.4426950408889634
    p_mean = MEANS + (plane * rows + o_m)[:, None] * DIM + channel[None, :]
    m_mean = m_m[:, None] & (channel[None, :] < DIM)
    b_q = tl.load(p_mean, mask=m_mean, other=0.0)  # [BLOCK_M, WIDTH]
    K += i_b * k_b + i_h * k_h
    V += i_b * v_b + i_h * v_h
    p_bits = BITS + i_b * bits_b + i_h * bits_h + o_m.to(tl.int64) * tl.cdiv(kb, 32)
    top = tl.full([BLOCK_M], -1.0e30, tl.float32)
    all_sum, kept_sum = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    all_acc, kept_acc = tl.zeros([BLOCK_M, WIDTH], tl.float32), tl.zeros([BLOCK_M, WIDTH], tl.float32)
    even = 0
    if DIM == WIDTH and not HAS_VALID:
        even = sk // BLOCK_N * BLOCK_N
        for start in range(0, even, BLOCK_N):
            top, all_sum, kept_sum, all_acc, kept_acc = _keys(
                b_q, K, V, start, k_s, v_s, o_n, p_bits, m_m, channel, top, all_sum, kept_sum, all_acc, kept_acc,
                scale2, BLOCK_K, DIM, BLOCK_N, False, PRECISION,
            )  # fmt: skip
    for start in range(even, sk, BLOCK_N):
        inside = start + o_n < sk
        if HAS_VALID:
            inside = inside & (tl.load(VALID + i_b * sk + start + o_n, mask=inside, other=0) != 0)
        top, all_sum, kept_sum, all_acc, kept_acc = _keys(
            b_q, K, V, start, k_s, v_s, inside, p_bits, m_m, channel, top, all_sum, kept_sum, all_acc, kept_acc,
            scale2, BLOCK_K, DIM, BLOCK_N, True, PRECISION,
        )  # fmt: skip
    kept_sum, kept_acc = pooled_keys(
        b_q, POOL_K + plane * kb * DIM, POOL_V + plane * kb * DIM, BIAS + i_b * bias_b + i_h * bias_h, p_bits, m_m, kb,
        top, kept_sum, kept_acc, scale2, channel, DIM, BLOCK_N, True, PRECISION,
    )  # fmt: skip
    lacks = all_acc / all_sum[:, None] - kept_acc / kept_sum[:, None]
    lacks = tl.where(tl.abs(lacks) < float("inf"), lacks, 0.0)  # NaN compares false as well
    p_out = OUT + (plane * rows + o_m)[:, None] * DIM + channel[None, :]
    tl.store(p_out, lacks.to(OUT.dtype.element_ty), mask=m_mean)


def step(size: int, stride: int) -> int:
    """A stride, 0 for a dimension that is broadcast."""
    return stride if size > 1 else 0


def _tiles(generation: int, dim: int, block_k: int) -> tuple[dict[str, int], dict[str, int]]:
    """Tile sizes and launch options; ``generation`` as :func:`dit_accel_kernels._launch.capability` has it."""
    wide = generation >= 90
    tile = min(64 if dim <= 128 else 32, block_k)
    tiles = {"BLOCK_M": 64 if wide else 32, "BLOCK_N": tile}
    return tiles, {"num_warps": 8 if wide or dim > 128 else 4, "num_stages": 2}


def residual_triton(
    means: Tensor, key: Tensor, value: Tensor, pooled: Pooled, key_valid: Tensor | None, block_k: int, scale: float
) -> Tensor:
    """See :func:`dit_accel_kernels.query_means.mean_query_residual`, with contiguous means ``[B, H, Qb, D]``."""
    batch, heads, rows, dim = means.shape
    out = torch.empty_like(means)
    pool_k, pool_v, bits, bias = pooled.k.contiguous(), pooled.v.contiguous(), pooled.bits, pooled.bias
    bits, bias = bits.contiguous(), bias.contiguous()
    tiles, options = _tiles(capability(means), dim, block_k)
    if tiles["BLOCK_N"] < 16 or block_k % tiles["BLOCK_N"]:
        raise ValueError(f"key blocks must be 16, 32 or a multiple of 64 tokens, got block_k={block_k}")
    valid = means if key_valid is None else key_valid.contiguous().view(torch.uint8)
    with torch.cuda.device_of(means):
        launch(residual_kernel, (blocks(rows, tiles["BLOCK_M"]), heads, batch))(
            means, key, value, pool_k, pool_v, bias, bits, valid, out, scale, rows, key.shape[2],
            *key.stride()[:3], *value.stride()[:3],
            step(bits.shape[0], bits.stride(0)), step(bits.shape[1], bits.stride(1)),
            step(bias.shape[0], bias.stride(0)), step(bias.shape[1], bias.stride(1)),
            BLOCK_K=block_k, DIM=dim, WIDTH=next_power_of_2(dim), **tiles,
            HAS_VALID=key_valid is not None, PRECISION="ieee" if means.dtype == torch.float32 else "tf32",
            **options,
        )  # fmt: skip
    return out


_SIZES = ("scale", "rows", "sk", "k_b", "k_h", "k_s", "v_b", "v_h", "v_s", "bits_b", "bits_h", "bias_b", "bias_h")


def _residual_spec(dim: int, dtype: str, valid: bool, targets: tuple[str, ...]) -> AotSpec:
    pointers = {name: f"*{dtype}" for name in ("MEANS", "K", "V", "POOL_K", "POOL_V")}
    pointers |= {"BIAS": "*fp32", "BITS": "*i32", "VALID": "*u8", "OUT": f"*{dtype}"}
    tiles, options = _tiles(90 if "sm_90" in targets else 0, dim, 64)
    constants: dict[str, object] = {"BLOCK_K": 64, "DIM": dim, "WIDTH": next_power_of_2(dim), "HAS_VALID": valid}
    constants |= {"PRECISION": "tf32", **tiles}
    return AotSpec(
        name=f"query_means/residual/d{dim}/{dtype}{'/valid' if valid else ''}/{tiles['BLOCK_M']}",
        fn=residual_kernel,
        signature=pointers
        | {name: "fp32" if name == "scale" else "i32" for name in _SIZES}
        | {name: "constexpr" for name in constants},
        constexprs=constants,
        options=options,
        divisible_by_16=("MEANS", "K", "V", "POOL_K", "POOL_V", "OUT", "k_b", "k_h", "k_s", "v_b", "v_h", "v_s"),
        targets=targets,
        max_spill_bytes=16,
    )


def _rows_spec(dim: int, add: bool) -> AotSpec:
    return AotSpec(
        name=f"query_means/{'add' if add else 'mean'}/d{dim}",
        fn=block_rows_kernel,
        signature={"X": "*bf16", "ROWS_OF": "*bf16", "TABLE": "*i32", "HEAD": "*i32"}
        | {name: "i32" for name in ("tokens", "count", "stride_b", "stride_h", "stride_s")}
        | {name: "constexpr" for name in ("BLOCK", "DIM", "WIDTH", "STEP", "HAS_ORDER", "ADD")},
        constexprs={
            "BLOCK": 128,
            "DIM": dim,
            "WIDTH": next_power_of_2(dim),
            "STEP": _ADD_ROWS if add else _MEAN_ROWS,
            "HAS_ORDER": True,
            "ADD": add,
        },
        options={"num_warps": 4},
        divisible_by_16=("X", "ROWS_OF", "stride_b", "stride_h", "stride_s"),
    )


AOT_SPECS = [
    *(
        _residual_spec(dim, dtype, valid, targets)
        for dim, dtype, valid in ((128, "bf16", False), (64, "fp16", True), (72, "bf16", False))
        for targets in (("sm_90", "sm_100"), ("sm_80", "sm_89", "gfx942"))
    ),
    _rows_spec(128, False),
    _rows_spec(128, True),
]
