"""The error that stays where a block of keys enters as its mean, by block statistics, for one or several token orders."""

from __future__ import annotations

import torch
from torch import Tensor

from .._common import blocks, check_bhsd, eager, resolve_backend
from ..types import TokenOrder
from .reference import spread_scores_reference

__all__ = ["spread_scores"]


def spread_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block_q: int,
    block_k: int,
    scale: float,
    order: TokenOrder | None = None,
    key_order: TokenOrder | None = None,
    candidates: Tensor | None = None,
    rows: Tensor | None = None,
    key_valid: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Expected error of each pair of blocks if the block of keys enters the softmax as one key, its mean.

    With ``q = q̄ + a`` and ``k = k̄ + b`` a logit is ``q̄ k̄ + a k̄ + q̄ b + a b``. The pooled key has the first two, the
    correction at the mean query (:mod:`dit_accel_kernels.query_means`) the third. What stays is ``a b``, of variance
    ``scale^2 sum_d var(a_d) var(b_d)`` for channels that vary apart from each other; the error of the output is the
    softmax mass of the block of means times that deviation times the root mean square distance of its values from the
    output. Nothing but block statistics is looked at, each token is read once for each order.

    Args:
        query: ``[B, H, Sq, D]`` in natural order, any strides, last dimension contiguous.
        key: ``[B, H, Sk, D]``, the same.
        value: like ``key``.
        block_q: tokens in a query block; the last one may be ragged.
        block_k: tokens in a key block.
        scale: factor of the logits.
        order: permutation under which blocks of queries are formed, ``None`` for natural order.
        key_order: the same for keys and values.
        candidates: int32 ``[C, S]``, orders to compare; all heads and all three tensors are taken in each of them.
        rows: integers ``[R]``, blocks of queries to look at; ``None`` for all.
        key_valid: bool ``[B, Sk]`` in natural order; invalid tokens count nothing, whatever they hold.
        backend: ``"triton"``, ``"cpu"``, ``"reference"`` or ``None`` for the fastest.

    Returns:
        float32 ``[C, B, H, R, ceil(Sk / block_k)]``, with ``C = 1`` without candidates.

    Raises:
        ValueError: shapes do not fit, there are both candidates and orders, or ``backend`` cannot run here.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_bhsd(name, x)
    if min(block_q, block_k) < 1:
        raise ValueError(f"a block must hold at least one token, got {block_q=}, {block_k=}")
    _check_shapes(query, key, value, key_valid)
    tables = _tables(query, key, order, key_order, candidates)
    use_triton = resolve_backend(backend, query) == "triton" and key.dtype == value.dtype == query.dtype
    return eager(_spread_scores_op, query)(
        query, key, value, block_q, block_k, scale, tables, rows, key_valid, use_triton
    )


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, key_valid: Tensor | None) -> None:
    expected = (*query.shape[:2], key.shape[2], query.shape[3])
    if tuple(key.shape) != expected or tuple(value.shape) != expected:
        raise ValueError(f"key and value must be {expected}, got {tuple(key.shape)} and {tuple(value.shape)}")
    if key_valid is not None and key_valid.shape != (key.shape[0], key.shape[2]):
        raise ValueError(f"key_valid must be {(key.shape[0], key.shape[2])}, got {tuple(key_valid.shape)}")


def _tables(
    query: Tensor, key: Tensor, order: TokenOrder | None, key_order: TokenOrder | None, candidates: Tensor | None
) -> list[Tensor | None]:
    """Table and heads of the queries, then of the keys; candidates have no heads."""
    if candidates is not None:
        if order is not None or key_order is not None:
            raise ValueError("candidates are orders of queries and keys, so order and key_order must be None")
        if candidates.ndim != 2 or candidates.shape[1] != query.shape[2] or query.shape[2] != key.shape[2]:
            raise ValueError(
                f"candidates must be [C, {query.shape[2]}] for as many queries as keys, got {tuple(candidates.shape)} "
                f"for {query.shape[2]} queries and {key.shape[2]} keys"
            )
        return [candidates, None, candidates, None]
    found: list[Tensor | None] = []
    for name, x, one in (("order", query, order), ("key_order", key, key_order)):
        if one is not None and (one.table.shape[1] != x.shape[2] or one.head.shape[0] != x.shape[1]):
            raise ValueError(
                f"{name} must hold {x.shape[2]} tokens and {x.shape[1]} heads, "
                f"got {one.table.shape[1]} and {one.head.shape[0]}"
            )
        found += [None, None] if one is None else [one.table, one.head]
    return found


@torch.library.custom_op("dit_accel_kernels::spread_scores", mutates_args=())
def _spread_scores_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
    orders: list[Tensor | None],
    rows: Tensor | None,
    key_valid: Tensor | None,
    use_triton: bool,
) -> Tensor:
    settings = (query, key, value, block_q, block_k, scale)
    if not use_triton:
        return spread_scores_reference(*settings, orders, rows, key_valid)
    from .triton import spread_scores_triton

    return spread_scores_triton(*settings, orders, rows, key_valid)


@_spread_scores_op.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
    orders: list[Tensor | None],
    rows: Tensor | None,
    key_valid: Tensor | None,
    use_triton: bool,
) -> Tensor:
    table, head = orders[2:]
    count = table.shape[0] if table is not None and head is None else 1
    looked_at = blocks(query.shape[2], block_q) if rows is None else rows.shape[0]
    shape = (count, *query.shape[:2], looked_at, blocks(key.shape[2], block_k))
    return query.new_empty(shape, dtype=torch.float32)
