"""Token permutations in Triton: every token is read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common import blocks, next_power_of_2
from .._launch import launch
from ..aot_spec import AotSpec
from ..stats.triton import valid_counts

__all__ = ["AOT_SPECS", "permute_and_pool_triton", "permute_triton"]

_ROWS = 32
_POOL_ROWS, _POOL_WARPS = 64, 4


# Counts are not specialised: another number of tokens must not compile another kernel.
@triton.jit(do_not_specialize=["tokens"])
def permute_kernel(
    X, TABLE, HEAD, OUT, tokens, stride_b, stride_h, stride_s,
    DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """One program: ROWS positions of one head. INVERSE scatters instead of gathering, so no inverse table is needed."""
    i_h, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    position = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, WIDTH)
    inside = position < tokens
    mask = inside[:, None] & (channel[None, :] < DIM)
    token = tl.load(TABLE + tl.load(HEAD + i_h).to(tl.int64) * tokens + position, mask=inside, other=0)
    source = position if INVERSE else token
    target = token if INVERSE else position
    # [ROWS, WIDTH]
    p_x = X + i_b * stride_b + i_h * stride_h + source.to(tl.int64)[:, None] * stride_s + channel[None, :]
    p_out = OUT + ((i_b * tl.num_programs(1) + i_h) * tokens + target.to(tl.int64))[:, None] * DIM + channel[None, :]
    tl.store(p_out, tl.load(p_x, mask=mask), mask=mask)


@triton.jit(do_not_specialize=["tokens", "count", "stride_valid"])
def permute_and_pool_kernel(
    K, V, TABLE, HEAD, VALID, OUT_K, OUT_V, MEAN_K, MEAN_V, tokens, count,
    stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, stride_valid,
    BLOCK: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, HAS_VALID: tl.constexpr,
):  # fmt: skip
    """One program: one block of one head, ROWS tokens of keys and values at a time."""
    i_block, i_h, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, WIDTH)
    p_table = TABLE + tl.load(HEAD + i_h).to(tl.int64) * tokens
    head = i_b * tl.num_programs(1) + i_h
    b_sum_k = tl.zeros([WIDTH], tl.float32)
    b_sum_v = tl.zeros([WIDTH], tl.float32)
    b_count = tl.zeros([ROWS], tl.float32)
    for part in range(0, BLOCK, ROWS):
        within = part + tl.arange(0, ROWS)
        position = i_block * BLOCK + within
        inside = (within < BLOCK) & (position < tokens)
        mask = inside[:, None] & (channel[None, :] < DIM)
        token = tl.load(p_table + position, mask=inside, other=0).to(tl.int64)
        # [ROWS, WIDTH]
        b_k = tl.load(
            K + i_b * stride_kb + i_h * stride_kh + token[:, None] * stride_ks + channel[None, :], mask=mask, other=0.0
        )
        b_v = tl.load(
            V + i_b * stride_vb + i_h * stride_vh + token[:, None] * stride_vs + channel[None, :], mask=mask, other=0.0
        )
        offset = (head * tokens + position.to(tl.int64))[:, None] * DIM + channel[None, :]
        tl.store(OUT_K + offset, b_k, mask=mask)
        tl.store(OUT_V + offset, b_v, mask=mask)
        valid = inside
        if HAS_VALID:
            valid = valid & (tl.load(VALID + i_b * stride_valid + position, mask=inside, other=0) != 0)
            # Not a product with 0: an invalid token may hold NaN.
            b_k = tl.where(valid[:, None], b_k.to(tl.float32), 0.0)
            b_v = tl.where(valid[:, None], b_v.to(tl.float32), 0.0)
        b_sum_k += tl.sum(b_k.to(tl.float32), 0)
        b_sum_v += tl.sum(b_v.to(tl.float32), 0)
        b_count += valid.to(tl.float32)
    b_all = tl.maximum(tl.sum(b_count, 0), 1.0)
    offset = (head * count + i_block) * DIM + channel
    tl.store(MEAN_K + offset, (b_sum_k / b_all).to(MEAN_K.dtype.element_ty), mask=channel < DIM)
    tl.store(MEAN_V + offset, (b_sum_v / b_all).to(MEAN_V.dtype.element_ty), mask=channel < DIM)


def permute_triton(x: Tensor, table: Tensor, head: Tensor, inverse: bool) -> Tensor:
    """Natural to block order, or back; see :func:`dit_accel_kernels.permute_tokens`."""
    batch, heads, tokens, dim = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        launch(permute_kernel, (blocks(tokens, _ROWS), heads, batch))(
            x, table.contiguous(), head.contiguous(), out, tokens, *x.stride()[:3],
            DIM=dim, WIDTH=next_power_of_2(dim), ROWS=_ROWS, INVERSE=inverse, num_warps=4,
        )  # fmt: skip
    return out


def permute_and_pool_triton(
    k: Tensor, v: Tensor, table: Tensor, head: Tensor, block: int, key_valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Permuted keys, values and their block means; see :func:`dit_accel_kernels.permute_and_pool`."""
    batch, heads, tokens, dim = k.shape
    count = blocks(tokens, block)
    out_k, out_v = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    means = (batch, heads, count, dim)
    mean_k, mean_v = (torch.empty(means, dtype=k.dtype, device=k.device) for _ in range(2))
    with torch.cuda.device_of(k):
        launch(permute_and_pool_kernel, (count, heads, batch))(
            k, v, table.contiguous(), head.contiguous(),
            k if key_valid is None else key_valid.contiguous().view(torch.uint8),
            out_k, out_v, mean_k, mean_v, tokens, count, *k.stride()[:3], *v.stride()[:3], tokens,
            BLOCK=block, DIM=dim, WIDTH=next_power_of_2(dim),
            ROWS=min(_POOL_ROWS, next_power_of_2(block)), HAS_VALID=key_valid is not None, num_warps=_POOL_WARPS,
        )  # fmt: skip
    return out_k, out_v, mean_k, mean_v, valid_counts(tokens, block, key_valid, k.device)


def _specs(dim: int, width: int, dtype: str, valid: bool) -> list[AotSpec]:
    tables = {"TABLE": "*i32", "HEAD": "*i32"}
    moves = {"X": f"*{dtype}"} | tables | {"OUT": f"*{dtype}"}
    moves |= {name: "i32" for name in ("tokens", "stride_b", "stride_h", "stride_s")}
    pools = {"K": f"*{dtype}", "V": f"*{dtype}"} | tables | {"VALID": "*u8"}
    pools |= {name: f"*{dtype}" for name in ("OUT_K", "OUT_V", "MEAN_K", "MEAN_V")}
    strides = tuple(f"stride_{name}" for name in ("kb", "kh", "ks", "vb", "vh", "vs"))
    pools |= {name: "i32" for name in ("tokens", "count", *strides, "stride_valid")}
    shape = {"DIM": dim, "WIDTH": width, "ROWS": _ROWS}
    return [
        AotSpec(
            name=f"{name}/d{dim}/{dtype}",
            fn=fn,
            signature=signature | {key: "constexpr" for key in constexprs},
            constexprs=constexprs,
            options={"num_warps": 4},
            divisible_by_16=aligned,
        )
        for name, fn, signature, constexprs, aligned in (
            (
                "permute",
                permute_kernel,
                moves,
                shape | {"INVERSE": valid},
                ("X", "OUT", "stride_b", "stride_h", "stride_s"),
            ),
            (
                "permute_and_pool",
                permute_and_pool_kernel,
                pools,
                {"BLOCK": 64} | shape | {"ROWS": _POOL_ROWS, "HAS_VALID": valid},
                ("K", "V", "OUT_K", "OUT_V", *strides),
            ),
        )
    ]


AOT_SPECS = _specs(128, 128, "bf16", False) + _specs(72, 128, "fp32", True)
