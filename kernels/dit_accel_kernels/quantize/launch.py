"""From tensors to launches of the quantiser's Triton kernels."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from .._common import blocks
from ..types import TokenOrder
from .reference import hadamard_size, scales
from .triton import key_stats_kernel, quantize_rows_kernel, quantize_values_kernel
from .types import LIMITS, Precision, QuantizedQKV, padded_dim, padded_keys

__all__ = ["quantize_triton"]

_CHUNK = 512
_QUERY_ROWS = 64
_VALUE_ROWS = 128
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
    valid = None if key_valid is None else key_valid.contiguous().view(torch.uint8)
    with torch.cuda.device_of(q):
        mean, top = _stats(k, v, precision, key_order, valid)
        q_codes, q_scale = _rows(q, precision, None, order, None, None)
        k_codes, k_scale = _rows(k, precision, block_k, key_order, valid, mean)
        values, v_scale = _values(v, precision.pv, key_order, valid, top)
    return QuantizedQKV(q_codes, q_scale, k_codes, k_scale, values, v_scale, mean, precision, block_k)


def _order_args(order: TokenOrder | None) -> dict[str, Any]:
    if order is None:
        return {"table": None, "head_row": None, "HAS_ORDER": False}
    return {"table": order.table.contiguous(), "head_row": order.head.contiguous(), "HAS_ORDER": True}


def _stats(
    k: Tensor, v: Tensor, precision: Precision, order: TokenOrder | None, valid: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Mean key ``[B, H, D]`` and largest value of each channel ``[B, H, Dp]``, each where the precision needs it."""
    batch, heads, tokens, dim = k.shape
    width, chunks = padded_dim(dim), blocks(tokens, _CHUNK)
    wants_mean, wants_top = precision.smooth_k, precision.pv != "bf16"
    if not (wants_mean or wants_top):
        return None, None
    shape = (batch, heads, chunks, width)
    sums = torch.empty(shape, dtype=torch.float64, device=k.device) if wants_mean else None
    tops = torch.empty(shape, dtype=torch.float32, device=k.device) if wants_top else None
    # The sum and the maximum do not depend on the order, unless it says which keys are valid.
    args = _order_args(None if valid is None else order)
    key_stats_kernel[(chunks, heads, batch)](
        k=k, v=v, valid=valid, sums=sums, tops=tops, tokens=tokens, chunks=chunks, **args,
        k_b=k.stride(0), k_h=k.stride(1), k_s=k.stride(2), v_b=v.stride(0), v_h=v.stride(1), v_s=v.stride(2),
        DIM=dim, WIDTH=width, ROWS=16, CHUNK=_CHUNK, HAS_VALID=valid is not None, HAS_SUMS=wants_mean,
        HAS_TOPS=wants_top, num_warps=4,
    )  # fmt: skip
    mean = None
    if sums is not None:
        count: Tensor | int = tokens
        if valid is not None:
            count = valid.sum(1).double().clamp(min=1)[:, None, None]
        mean = (sums.sum(2)[..., :dim] / count).float()
    return mean, None if tops is None else tops.amax(2)


def _rows(
    x: Tensor,
    precision: Precision,
    block: int | None,
    order: TokenOrder | None,
    valid: Tensor | None,
    mean: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Codes of queries (``block`` of ``None``: one scale a token) or of keys, and their scales."""
    batch, heads, tokens, dim = x.shape
    width, kind = padded_dim(dim), precision.qk
    step = _QUERY_ROWS if block is None else block
    count, rows = blocks(tokens, step), triton.next_power_of_2(step)
    columns = width // 2 if kind == "int4" else width
    out = torch.empty((batch, heads, tokens, columns), dtype=_DTYPES[kind], device=x.device)
    scale = torch.empty((batch, heads, tokens if block is None else count), dtype=torch.float32, device=x.device)
    size = hadamard_size(dim) if precision.rotate else 1
    quantize_rows_kernel[(count, heads, batch)](
        x=x, valid=valid, mean=mean, out=out, scale=scale, tokens=tokens, count=count, **_order_args(order),
        stride_b=x.stride(0), stride_h=x.stride(1), stride_s=x.stride(2),
        DIM=dim, WIDTH=width, ROWS=rows, BLOCK=step, KIND=kind, LIMIT=LIMITS[kind], STEPS=size.bit_length() - 1,
        NORM=size**-0.5, PER_TOKEN=block is None, HAS_VALID=valid is not None, HAS_MEAN=mean is not None,
        num_warps=row_warps(rows, width), enable_fp_fusion=False,
    )  # fmt: skip
    return out, scale


def _values(
    v: Tensor, kind: str, order: TokenOrder | None, valid: Tensor | None, top: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Values as :class:`QuantizedQKV` has them, and their scales."""
    batch, heads, tokens, dim = v.shape
    width, columns = padded_dim(dim), padded_keys(tokens)
    if top is None:
        if order is not None:
            from ..permute.triton import permute_triton

            v = permute_triton(v, order.table, order.head, False)
        return v, torch.ones((batch, heads, width), dtype=torch.float32, device=v.device)
    scale, inverse = scales(top, LIMITS[kind])
    out = torch.empty((batch, heads, width, columns), dtype=_DTYPES[kind], device=v.device)
    quantize_values_kernel[(columns // _VALUE_ROWS, heads, batch)](
        v=v, valid=valid, inverse=inverse, out=out, tokens=tokens, columns=columns, **_order_args(order),
        stride_b=v.stride(0), stride_h=v.stride(1), stride_s=v.stride(2),
        DIM=dim, WIDTH=width, ROWS=_VALUE_ROWS, KIND=kind, LIMIT=LIMITS[kind], HAS_VALID=valid is not None,
        num_warps=row_warps(_VALUE_ROWS, width), enable_fp_fusion=False,
    )  # fmt: skip
    return out, scale


def row_warps(rows: int, width: int) -> int:
    """Warps such that a thread holds about 64 elements of a tile."""
    return max(4, min(16, rows * width // 2048))
