"""What sparse attention lacks at the mean query of each block, added to all queries of that block.

Block-sparse attention with a pooled remainder replaces each skipped block of keys by its mean. What that leaves out is
nearly the same for all queries of a block, and the mean query of the block knows most of it: with ``q̄_i`` the mean of
block ``i``, ``dense(q̄_i) - sparse_i(q̄_i)`` is added to each of its outputs. The error that stays is of the second order,
``(q - q̄) . (k - k̄)`` within skipped blocks, and the pass over all keys costs ``1 / block_q`` of dense attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._common import blocks, check_bhsd, eager, resolve_backend
from ..types import Pooled, TokenOrder
from .hopper_launch import residual_hopper, self_test, why_not_hopper
from .reference import add_rows_reference, mean_queries_reference, residual_reference

__all__ = ["add_query_means_", "mean_queries", "mean_query_residual"]


def mean_queries(query: Tensor, *, order: TokenOrder | None = None, block_q: int, backend: str | None = None) -> Tensor:
    """Mean of the queries of each block.

    Args:
        query: ``[B, H, Sq, D]`` in natural order, any strides, last dimension contiguous.
        order: permutation under which query blocks are formed; ``None`` is natural order.
        block_q: tokens in a query block.
        backend: ``"triton"``, ``"cpu"``, ``"reference"`` or ``None`` for the fastest.

    Returns:
        ``[B, H, ceil(Sq / block_q), D]`` in the dtype of ``query``, in block order.

    Raises:
        ValueError: shapes do not fit, or ``backend`` cannot run here.
    """
    check_bhsd("query", query)
    if block_q < 1:
        raise ValueError(f"a block must hold at least one token, got {block_q=}")
    table, head = (None, None) if order is None else (order.table, order.head)
    use_triton = resolve_backend(backend, query) == "triton"
    found: Tensor = eager(_means_op, query)(query, table, head, block_q, use_triton)
    return found


def mean_query_residual(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pooled: Pooled,
    *,
    order: TokenOrder | None = None,
    block_q: int,
    block_k: int,
    scale: float,
    key_valid: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Dense attention of the mean query of each block less its sparse attention with a pooled remainder.

    Args:
        query: ``[B, H, Sq, D]`` in natural order, any strides, last dimension contiguous.
        key: ``[B, H, Sk, D]`` in block order.
        value: like ``key``.
        pooled: mean keys and values, and the bits of blocks that are exact, ``[B|1, H|1, Qb, ceil(Kb / 32)]``.
        order: permutation under which query blocks are formed; ``None`` is natural order.
        block_q: tokens in a query block.
        block_k: tokens in a key block.
        scale: factor of the logits.
        key_valid: bool ``[B, Sk]`` in block order, false for keys that nobody sees and that may hold NaN.
        backend: ``"hopper"``, ``"triton"``, ``"cpu"``, ``"reference"`` or ``None`` for the fastest.

    Returns:
        ``[B, H, Qb, D]`` in the dtype of ``query``, in block order; 0 where it would not be finite, so that a NaN in one
        query stays its own.

    Raises:
        ValueError: shapes do not fit, or ``backend`` cannot run here.
    """
    _check(query, key, value, pooled, block_q, block_k, key_valid)
    chosen = _resolve(backend, query, key, value, key_valid, block_k)
    table, head = (None, None) if order is None else (order.table, order.head)
    parts = (pooled.k, pooled.v, pooled.bias, pooled.bits)
    op = eager(_residual_op, query)
    found: Tensor = op(query, key, value, *parts, table, head, key_valid, block_q, block_k, scale, chosen)
    return found


def _resolve(
    backend: str | None, query: Tensor, key: Tensor, value: Tensor, key_valid: Tensor | None, block_k: int
) -> str:
    """The implementation of :func:`mean_query_residual` to use; ``"tested"`` is ``"hopper"`` if its self-test passes."""
    if backend in (None, "hopper"):
        reason = why_not_hopper(query, key, value, key_valid, block_k)
        if reason is None:
            return backend or "tested"
        if backend is not None:
            raise ValueError(f"backend='hopper' cannot run: {reason}")
    return resolve_backend(backend, query)


def add_query_means_(
    out: Tensor, rows: Tensor, *, order: TokenOrder | None = None, block_q: int, backend: str | None = None
) -> Tensor:
    """Add to each output the row of its block, in place: ``out[b, h, table[head[h], i]] += rows[b, h, i // block_q]``.

    Args:
        out: ``[B, H, Sq, D]`` in natural order, any strides, last dimension contiguous; changed.
        rows: ``[B, H, ceil(Sq / block_q), D]`` from :func:`mean_query_residual`.
        order: as given there.
        block_q: as given there.
        backend: ``"triton"``, ``"cpu"``, ``"reference"`` or ``None`` for the fastest.

    Returns:
        ``out``.

    Raises:
        ValueError: shapes do not fit, or ``backend`` cannot run here.
    """
    check_bhsd("out", out)
    expected = (*out.shape[:2], blocks(out.shape[2], block_q), out.shape[3])
    if tuple(rows.shape) != expected:
        raise ValueError(f"rows must be {list(expected)} for an output {list(out.shape)}, got {list(rows.shape)}")
    table, head = (None, None) if order is None else (order.table, order.head)
    eager(_add_op, out)(out, rows.contiguous(), table, head, block_q, resolve_backend(backend, out) == "triton")
    return out


def _check(
    query: Tensor, key: Tensor, value: Tensor, pooled: Pooled, block_q: int, block_k: int, key_valid: Tensor | None
) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_bhsd(name, x)
    batch, heads, tokens, dim = query.shape
    if key.shape != value.shape or key.shape[:2] != query.shape[:2] or key.shape[3] != dim:
        raise ValueError(
            f"key and value must be [{batch}, {heads}, Sk, {dim}], got {list(key.shape)} and {list(value.shape)}"
        )
    if block_q < 1 or block_k < 1:
        raise ValueError(f"a block must hold at least one token, got {block_q=} and {block_k=}")
    rows, cols = blocks(tokens, block_q), blocks(key.shape[2], block_k)
    if tuple(pooled.k.shape) != (batch, heads, cols, dim) or pooled.v.shape != pooled.k.shape:
        raise ValueError(f"pooled keys must be {[batch, heads, cols, dim]}, got {list(pooled.k.shape)}")
    if tuple(pooled.bits.shape[2:]) != (rows, (cols + 31) // 32):
        raise ValueError(f"bits must be [B, H, {rows}, {(cols + 31) // 32}], got {list(pooled.bits.shape)}")
    if key_valid is not None and tuple(key_valid.shape) != (batch, key.shape[2]):
        raise ValueError(f"key_valid must be {[batch, key.shape[2]]}, got {list(key_valid.shape)}")


@torch.library.custom_op("dit_accel_kernels::mean_queries", mutates_args=())
def _means_op(query: Tensor, table: Tensor | None, head: Tensor | None, block_q: int, use_triton: bool) -> Tensor:
    if use_triton:
        from .triton import mean_queries_triton

        return mean_queries_triton(query, table, head, block_q)
    return mean_queries_reference(query, table, head, block_q)


@_means_op.register_fake
def _(query: Tensor, table: Tensor | None, head: Tensor | None, block_q: int, use_triton: bool) -> Tensor:
    batch, heads, tokens, dim = query.shape
    return query.new_empty(batch, heads, blocks(tokens, block_q), dim)


@torch.library.custom_op("dit_accel_kernels::mean_query_residual", mutates_args=())
def _residual_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pool_k: Tensor,
    pool_v: Tensor,
    bias: Tensor,
    bits: Tensor,
    table: Tensor | None,
    head: Tensor | None,
    key_valid: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
    backend: str,
) -> Tensor:
    pooled = Pooled(pool_k, pool_v, bias, bits)
    if backend in ("tested", "hopper", "triton"):
        from .triton import mean_queries_triton, residual_triton

        means = mean_queries_triton(query, table, head, block_q)
        if backend == "tested" and self_test(query.device, query.dtype, query.shape[3], block_k) is None:
            backend = "hopper"
        if backend == "hopper":
            return residual_hopper(means, key, value, pooled, block_k, scale)
        return residual_triton(means, key, value, pooled, key_valid, block_k, scale)
    means = mean_queries_reference(query, table, head, block_q)
    return residual_reference(means, key, value, pooled, key_valid, block_k, scale)


@_residual_op.register_fake
def _(query: Tensor, *args: object) -> Tensor:
    batch, heads, tokens, dim = query.shape
    block_q = args[9]
    assert isinstance(block_q, int)
    return query.new_empty(batch, heads, blocks(tokens, block_q), dim)


@torch.library.custom_op("dit_accel_kernels::add_query_means_", mutates_args=("out",))
def _add_op(
    out: Tensor, rows: Tensor, table: Tensor | None, head: Tensor | None, block_q: int, use_triton: bool
) -> None:
    if use_triton:
        from .triton import add_rows_triton

        add_rows_triton(out, rows, table, head, block_q)
    else:
        add_rows_reference(out, rows, table, head, block_q)


@_add_op.register_fake
def _(out: Tensor, rows: Tensor, table: Tensor | None, head: Tensor | None, block_q: int, use_triton: bool) -> None:
    return None
