"""Block-sparse attention on 8-bit operands; see :func:`quantized_block_sparse_attention`."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from .._common import eager
from ..block_sparse.checks import check_extras, check_lists, check_tensors
from ..quantize import Precision, QuantizedQKV, padded_dim, padded_keys, quantize_qkv, resolve_precision
from ..types import BlockLists, Pooled, TokenOrder
from .backends import choose, require, run

__all__ = ["quantized_block_sparse_attention"]


def quantized_block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    *,
    precision: str | Precision,
    scale: float | None = None,
    order: TokenOrder | None = None,
    pooled: Pooled | None = None,
    key_valid: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    prepared: QuantizedQKV | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Do what :func:`dit_accel_kernels.block_sparse_attention` does, with 8-bit products (SageAttention 2411.10958).

    Queries have one scale a token, keys one a block and values one a channel. Weights are multiplied in 16 bits, in e4m3,
    or in INT8 with one factor for each row and tile (PAROAttention, arXiv 2506.16054); sums across tiles are float32.
    Pooled keys and values stay in the dtype of ``q``: their logits are those of the queries as they were given. INT4 codes
    are spread to INT8 before they are multiplied: that format shows accuracy, not speed.

    There are no token windows here: ``partial`` blocks of ``lists`` are whole.

    Args:
        q: ``[B, H, Sq, D]`` in natural order; any strides, last dimension contiguous.
        k: ``[B, H, Sk, D]`` in block order; any strides, last dimension contiguous.
        v: like ``k``.
        lists: the blocks that each query block visits.
        precision: the number formats, or their name in :data:`dit_accel_kernels.quantize.PRECISIONS`.
        scale: positive factor of the logits, ``D ** -0.5`` by default.
        order: permutation under which query blocks are formed; the output is in natural order all the same.
        pooled: one mean key and value for each block that is not visited; ``[B, H, Kb, D]``, not smoothed.
        key_valid: bool ``[B, Sk]`` in block order, false for padding of ``k``. 16-bit values of padding must be finite.
        return_lse: also return the log-sum-exp, natural logarithm, with the share of the mean key added back.
        backend: ``"hopper"``, ``"triton"``, ``"reference"``, or ``None`` for the first that passed its self-test here.
        prepared: what :func:`dit_accel_kernels.quantize.quantize_qkv` made of these tensors with this ``precision``,
            ``order`` and ``key_valid``; otherwise it is called here. ``k`` and ``v`` are then not read.

    Returns:
        The output ``[B, H, Sq, D]`` with the dtype and layout of ``q``; with ``return_lse`` also float32 ``[B, H, Sq]``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, ``scale`` is not positive, ``prepared`` does not fit, or
            ``precision`` or ``backend`` is unknown or cannot run here.
        RuntimeError: the requested backend failed its self-test.
    """
    precision = resolve_precision(precision)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    check_tensors(q, k, v, scale)
    check_lists(q, k, lists)
    check_extras(q, k, lists, order, pooled, None, key_valid)
    if prepared is None:
        prepared = quantize_qkv(q, k, v, precision, block_k=lists.block_k, order=order, key_valid=key_valid)
    else:
        _check_prepared(prepared, q, k, lists, precision)
    made = prepared
    out, lse = cast(
        "tuple[Tensor, Tensor]",
        eager(_op, q)(
            q,
            *(made.q, made.q_scale, made.k, made.k_scale, made.v, made.v_scale, made.k_mean),
            *(precision.qk, precision.pv, precision.smooth_k, precision.rotate),
            *(lists.row_start, lists.full, lists.partial, lists.indices, lists.block_q, lists.block_k),
            scale,
            *((None, None) if order is None else (order.table, order.head)),
            *((None,) * 4 if pooled is None else (pooled.k, pooled.v, pooled.bias, pooled.bits)),
            key_valid,
            return_lse,
            backend or "",
        ),
    )
    return (out, lse) if return_lse else out


def _check_prepared(made: QuantizedQKV, q: Tensor, k: Tensor, lists: BlockLists, precision: Precision) -> None:
    """Raise ``ValueError`` unless quantised tensors fit the call."""
    if made.precision != precision or made.block_k != lists.block_k:
        raise ValueError(
            f"prepared must have {precision} and block_k {lists.block_k}, got {made.precision} and {made.block_k}"
        )
    (batch, heads, sq, dim), sk = q.shape, k.shape[2]
    width = padded_dim(dim)
    columns = width // 2 if precision.qk == "int4" else width
    values = (sk, dim) if precision.pv == "bf16" else (width, padded_keys(sk))
    for name, x, sizes in (
        ("q", made.q, (sq, columns)),
        ("q_scale", made.q_scale, (sq,)),
        ("k", made.k, (sk, columns)),
        ("k_scale", made.k_scale, (-(-sk // lists.block_k),)),
        ("v", made.v, values),
        ("v_scale", made.v_scale, (width,)),
    ):
        if x.shape != (batch, heads, *sizes) or x.device != q.device:
            wanted = [batch, heads, *sizes]
            raise ValueError(f"prepared.{name} must be {wanted} on {q.device}, got {list(x.shape)} on {x.device}")


@torch.library.custom_op("dit_accel_kernels::quantized_block_sparse_attention", mutates_args=())
def _op(
    q: Tensor,
    q_codes: Tensor,
    q_scale: Tensor,
    k_codes: Tensor,
    k_scale: Tensor,
    values: Tensor,
    v_scale: Tensor,
    k_mean: Tensor | None,
    qk: str,
    pv: str,
    smooth_k: bool,
    rotate: bool,
    row_start: Tensor,
    full: Tensor,
    partial: Tensor | None,
    indices: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
    table: Tensor | None,
    head: Tensor | None,
    pooled_k: Tensor | None,
    pooled_v: Tensor | None,
    bias: Tensor | None,
    bits: Tensor | None,
    key_valid: Tensor | None,
    return_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    order = TokenOrder(table, head) if table is not None and head is not None else None
    pooled = None
    if pooled_k is not None and pooled_v is not None and bias is not None and bits is not None:
        pooled = Pooled(pooled_k, pooled_v, bias, bits)
    precision = Precision(qk, pv, smooth_k, rotate)
    made = QuantizedQKV(q_codes, q_scale, k_codes, k_scale, values, v_scale, k_mean, precision, block_k)
    where: dict[str, Any] = {
        "device": q.device,
        "dtype": q.dtype,
        "head_dim": q.shape[-1],
        "block_q": block_q,
        "block_k": block_k,
        "precision": precision,
    }
    if backend:
        require(backend, **where)
    else:
        backend = choose(**where)[0]
    lists = BlockLists(row_start, full, partial, indices, block_q, block_k)
    out, lse = run(
        backend, q, made, lists, scale=scale, order=order, pooled=pooled, key_valid=key_valid, return_lse=return_lse
    )
    return out, lse if return_lse else q.new_empty(0, dtype=torch.float32)


@_op.register_fake
def _(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return_lse = args[-2]
    shape = q.shape[:3] if return_lse else (0,)
    return torch.empty_like(q), torch.empty(shape, dtype=torch.float32, device=q.device)
