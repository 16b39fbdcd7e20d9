"""From tensors to launches of the quantiser's Triton kernels."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from .._common import blocks
from .._launch import capability, launch
from ..types import TokenOrder
from .reference import hadamard_size
from .specs import tiles
from .triton import clear_kernel, keys_kernel, queries_kernel
from .types import LIMITS, Precision, QuantizedQKV, padded_dim, padded_keys

__all__ = ["quantize_triton"]

_CLEAR = 1024
_DTYPES = {"int8": torch.int8, "int4": torch.uint8, "fp8": torch.float8_e4m3fn}


def quantize_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    precision: Precision,
    block_k: int,
    order: TokenOrder | None,
    key_order: TokenOrder | None,
    key_valid: Tensor | None,
) -> QuantizedQKV:
    """Quantise; see :func:`dit_accel_kernels.quantize.quantize_qkv`. Orders of ``None`` leave the tokens where they are."""
    batch, heads, tokens, dim = k.shape
    width, kind = padded_dim(dim), precision.qk
    valid = None if key_valid is None else key_valid.contiguous().view(torch.uint8)
    columns = width // 2 if kind == "int4" else width

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty((batch, heads, *shape), dtype=dtype, device=k.device)

    with torch.cuda.device_of(q):
        made = QuantizedQKV(
            q=empty(q.shape[2], columns, dtype=_DTYPES[kind]),
            q_scale=empty(q.shape[2]),
            k=empty(tokens, columns, dtype=_DTYPES[kind]),
            k_scale=empty(blocks(tokens, block_k)),
            v=_empty_values(v, precision.pv, key_order, width),
            v_scale=torch.ones((batch, heads, width), device=k.device) if precision.pv == "bf16" else empty(width),
            k_mean=empty(dim) if precision.smooth_k else None,
            precision=precision,
            block_k=block_k,
        )
        _launch(q, k, v, made, order, key_order, valid)
    return made


def _empty_values(v: Tensor, kind: str, order: TokenOrder | None, width: int) -> Tensor:
    """16-bit values in their order, or room for codes."""
    if kind != "bf16":
        shape = (*v.shape[:2], width, padded_keys(v.shape[2]))
        return torch.empty(shape, dtype=_DTYPES[kind], device=v.device)
    if order is not None:
        from ..permute.triton import permute_triton

        return permute_triton(v, order.table, order.head, False)
    return v


def _shared(
    k: Tensor, v: Tensor, made: QuantizedQKV, key_order: TokenOrder | None, valid: Tensor | None, tops: Tensor
) -> dict[str, Any]:
    """Arguments that both launches have."""
    dim, kind = k.shape[3], made.precision.qk
    size = hadamard_size(dim) if made.precision.rotate else 1
    args: dict[str, Any] = {
        "k": k, "v": v, "valid": valid, "k_table": None, "k_head": None, "mean": made.k_mean,
        "tops": tops.view(torch.float32), "tokens": k.shape[2], "heads": k.shape[1],
        "k_b": k.stride(0), "k_h": k.stride(1), "k_s": k.stride(2),
        "v_b": v.stride(0), "v_h": v.stride(1), "v_s": v.stride(2),
        "DIM": dim, "WIDTH": padded_dim(dim), "KIND": kind, "LIMIT": LIMITS[kind],
        "STEPS": size.bit_length() - 1, "NORM": size**-0.5, "HAS_ORDER": key_order is not None,
        "HAS_VALID": valid is not None, "HAS_MEAN": made.precision.smooth_k,
        "HAS_VALUES": made.precision.pv != "bf16", "ASM": capability(k) >= 90, "enable_fp_fusion": False,
    }  # fmt: skip
    if key_order is not None:
        args |= {"k_table": key_order.table.contiguous(), "k_head": key_order.head.contiguous()}
    return args


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    made: QuantizedQKV,
    order: TokenOrder | None,
    key_order: TokenOrder | None,
    valid: Tensor | None,
) -> None:
    groups, tokens, pv = k.shape[0] * k.shape[1], k.shape[2], made.precision.pv
    has_values, width, key_blocks = pv != "bf16", padded_dim(k.shape[3]), made.k_scale.shape[2]
    first, second = tiles(width)
    sums, flags, tops = _zeros(k, groups * width, groups, groups * width // 2)
    shared = _shared(k, v, made, key_order, valid, tops)
    statistics = blocks(tokens, first["CHUNK"]) * (made.precision.smooth_k + has_values)
    launch(queries_kernel, (groups * (blocks(q.shape[2], first["Q_TILE"]) + statistics),))(
        q=q, divisors=None if valid is None else valid.sum(1).double().clamp(min=1),
        q_table=None if order is None else order.table.contiguous(),
        q_head=None if order is None else order.head.contiguous(), q_out=made.q, q_scale=made.q_scale,
        v_scale=made.v_scale if has_values else None, sums=sums.view(torch.float64), flags=flags.view(torch.int32),
        q_tokens=q.shape[2], q_b=q.stride(0), q_h=q.stride(1), q_s=q.stride(2), V_LIMIT=LIMITS.get(pv, 0.0),
        HAS_Q_ORDER=order is not None, **shared, **first,
    )  # fmt: skip
    launch(keys_kernel, (groups * (key_blocks + has_values * padded_keys(tokens) // second["V_TILE"]),))(
        k_out=made.k, k_scale=made.k_scale, v_out=made.v.view(torch.int32) if has_values else None,
        blocks=key_blocks, BLOCK=made.block_k, ROWS=triton.next_power_of_2(made.block_k), V_KIND=pv,
        **shared, **second,
    )  # fmt: skip


def _zeros(like: Tensor, *sizes: int) -> tuple[Tensor, ...]:
    """Zeros of 8 bytes each, in one piece of memory: by a kernel, so that a recorded call makes them again."""
    x = torch.empty(sum(sizes), dtype=torch.int64, device=like.device)
    launch(clear_kernel, (blocks(x.numel(), _CLEAR),))(x=x, count=x.numel(), BLOCK=_CLEAR, num_warps=4)
    return x.split(list(sizes))
