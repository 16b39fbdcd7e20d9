"""Queries, keys and values in 8 or 4 bits; see :func:`quantize_qkv`."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from .._common import check_bhsd, eager, resolve_backend
from ..types import TokenOrder
from .formats import fp8_reason
from .packing import operand_order, pack_int4, to_operand_order, unpack_int4
from .reference import hadamard, hadamard_size, quantize_reference
from .types import PRECISIONS, Precision, QuantizedQKV, padded_dim, padded_keys, resolve_precision

__all__ = [
    "PRECISIONS",
    "Precision",
    "QuantizedQKV",
    "fp8_reason",
    "hadamard",
    "hadamard_size",
    "operand_order",
    "pack_int4",
    "padded_dim",
    "padded_keys",
    "quantize_qkv",
    "resolve_precision",
    "to_operand_order",
    "unpack_int4",
]

_MAX_BLOCK = 256


def quantize_qkv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    precision: str | Precision,
    *,
    block_k: int,
    order: TokenOrder | None = None,
    key_order: TokenOrder | None = None,
    keys_ordered: bool = True,
    key_valid: Tensor | None = None,
    backend: str | None = None,
) -> QuantizedQKV:
    """Quantise queries per token, keys per block and values per channel, moving them to block order in the same pass.

    Elements that are not finite count as 0 (in smoothed keys as the mean), in scales and in codes: a token with a NaN or
    an infinity spoils no scale but its own, and the result is finite. 16-bit values are passed on as they are. In one
    block of keys, one *finite* outlier does set the scale of all.

    Args:
        q: ``[B, H, Sq, D]`` in natural order; any strides, last dimension contiguous.
        k: ``[B, H, Sk, D]``, see ``keys_ordered``.
        v: like ``k``.
        precision: the number formats, or their name in :data:`PRECISIONS`.
        block_k: tokens in a key block, that of the lists the result is used with.
        order: order of the queries in the result; ``None`` keeps the natural one.
        key_order: with ``keys_ordered=False`` the order of the keys and values, by default ``order``.
        keys_ordered: keys and values come in block order; otherwise in natural order, and are moved by ``key_order``.
        key_valid: bool ``[B, Sk]`` in **block order**; invalid keys have codes 0 and count in no scale and no mean.
        backend: ``"triton"``, ``"cpu"``, ``"reference"`` or ``None`` for the fastest; all give the same bits.

    Returns:
        Codes and scales.

    Raises:
        ValueError: shapes or orders do not fit, an unknown precision, or ``backend`` cannot run here.
    """
    precision = resolve_precision(precision)
    moved = None if keys_ordered else (order if key_order is None else key_order)
    _check(q, k, v, block_k, order, moved, key_valid)
    # What the hardware has is asked within the operator: torch.compile traces what is here.
    chosen = resolve_backend(backend, q)
    if backend is None and chosen == "triton":
        chosen = ""
    flags = (precision.qk, precision.pv, precision.smooth_k, precision.rotate)
    tables = [part for o in (order, moved) for part in ((None, None) if o is None else (o.table, o.head))]
    made = cast("tuple[Tensor, ...]", eager(_quantize_op, q)(q, k, v, *flags, block_k, *tables, key_valid, chosen))
    q_codes, q_scale, k_codes, k_scale, values, v_scale, mean = made
    if precision.pv == "bf16" and moved is None:
        values = v  # an operator must not return its input
    return QuantizedQKV(
        q_codes, q_scale, k_codes, k_scale, values, v_scale, mean if precision.smooth_k else None, precision, block_k
    )


def _triton_reason(q: Tensor, precision: Precision, block_k: int) -> str | None:
    """Why the Triton kernels cannot make these formats here, or ``None``; plain torch can everywhere."""
    if block_k > _MAX_BLOCK:
        return f"block_k must be at most {_MAX_BLOCK}, got {block_k}"
    if "fp8" in (precision.qk, precision.pv):
        return fp8_reason(q.device)
    return None


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_k: int,
    order: TokenOrder | None,
    key_order: TokenOrder | None,
    key_valid: Tensor | None,
) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_bhsd(name, x)
        if x.dtype != q.dtype or not x.is_floating_point():
            raise ValueError(f"{name} must be of a floating-point dtype like q, got {x.dtype} and {q.dtype}")
    if k.shape != v.shape or k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3]:
        shapes = [tuple(x.shape) for x in (q, k, v)]
        raise ValueError(f"q, k and v must agree in B, H and D, k and v in S, got {shapes}")
    if 0 in q.shape or 0 in k.shape or q.shape[3] > 256:
        raise ValueError(f"no dimension may be empty and D at most 256, got {tuple(q.shape)} and {tuple(k.shape)}")
    if block_k < 1:
        raise ValueError(f"a block must hold at least one token, got {block_k=}")
    for name, o, tokens in (("order", order, q.shape[2]), ("key_order", key_order, k.shape[2])):
        if o is not None and (o.table.shape[1] != tokens or o.head.shape[0] != q.shape[1]):
            got = f"{o.table.shape[1]} and {o.head.shape[0]}"
            raise ValueError(f"{name} must hold {tokens} tokens and {q.shape[1]} heads, got {got}")
    if key_valid is not None and key_valid.shape != (k.shape[0], k.shape[2]):
        raise ValueError(f"key_valid must be {(k.shape[0], k.shape[2])}, got {tuple(key_valid.shape)}")


@torch.library.custom_op("dit_accel_kernels::quantize_qkv", mutates_args=())
def _quantize_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qk: str,
    pv: str,
    smooth_k: bool,
    rotate: bool,
    block_k: int,
    table: Tensor | None,
    head: Tensor | None,
    key_table: Tensor | None,
    key_head: Tensor | None,
    key_valid: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    order = TokenOrder(table, head) if table is not None and head is not None else None
    key_order = TokenOrder(key_table, key_head) if key_table is not None and key_head is not None else None
    precision = Precision(qk, pv, smooth_k, rotate)
    reason = None if backend in ("cpu", "reference") else _triton_reason(q, precision, block_k)
    if reason is not None and backend == "triton":
        raise ValueError(f"backend='triton' cannot run: {reason}")
    if reason is None and backend in ("", "triton"):
        from .launch import quantize_triton

        made = quantize_triton(q, k, v, precision, block_k, order, key_order, key_valid)
    else:
        made = quantize_reference(q, k, v, precision, block_k, order, key_order, key_valid)
    values = q.new_empty(0) if pv == "bf16" and key_order is None else made.v
    mean = q.new_empty(0, dtype=torch.float32) if made.k_mean is None else made.k_mean
    return made.q, made.q_scale, made.k, made.k_scale, values, made.v_scale, mean


@_quantize_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qk: str,
    pv: str,
    smooth_k: bool,
    rotate: bool,
    block_k: int,
    table: Tensor | None,
    head: Tensor | None,
    key_table: Tensor | None,
    key_head: Tensor | None,
    key_valid: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, heads, sq, dim = q.shape
    sk, width = k.shape[2], padded_dim(dim)
    kinds = {"int8": torch.int8, "int4": torch.uint8, "fp8": torch.float8_e4m3fn}
    columns = width // 2 if qk == "int4" else width

    def scales(*shape: int) -> Tensor:
        return q.new_empty(shape, dtype=torch.float32)

    if pv != "bf16":
        values = q.new_empty((batch, heads, width, padded_keys(sk)), dtype=kinds[pv])
    else:
        values = q.new_empty(0 if key_table is None else v.shape)
    return (
        q.new_empty((batch, heads, sq, columns), dtype=kinds[qk]),
        scales(batch, heads, sq),
        q.new_empty((batch, heads, sk, columns), dtype=kinds[qk]),
        scales(batch, heads, -(-sk // block_k)),
        values,
        scales(batch, heads, width),
        scales(batch, heads, dim) if smooth_k else scales(0),
    )
