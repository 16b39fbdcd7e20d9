"""The error that stays where a block of keys enters as its mean, with the mass of blocks from means of a few tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from .._common import blocks, check_bhsd, eager, resolve_backend
from ..types import TokenOrder
from .reference import fine_spread_scores_reference

__all__ = ["fine_spread_scores"]


def fine_spread_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    tokens: int,
    block_q: int,
    block_k: int,
    scale: float,
    order: TokenOrder | None = None,
    key_order: TokenOrder | None = None,
    key_valid: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Expected error of each pair of blocks if the block of keys enters the softmax as one key, its mean.

    Like :func:`dit_accel_kernels.spread.spread_scores`, but the softmax mass of a block is that of the means of ``tokens``
    queries and keys each, added up over the block. Runs of a few tokens find what single tokens look for, which the mean
    of a block of keys hides.

    Args:
        query: ``[B, H, Sq, D]`` in natural order, any strides, last dimension contiguous.
        key: ``[B, H, Sk, D]``, the same.
        value: like ``key``.
        tokens: tokens of a run; a divisor of both blocks.
        block_q: tokens in a query block; the last one may be ragged.
        block_k: tokens in a key block.
        scale: factor of the logits.
        order: permutation under which runs and blocks of queries are formed, ``None`` for natural order.
        key_order: the same for keys and values.
        key_valid: bool ``[B, Sk]`` in natural order; invalid tokens count nothing, whatever they hold.
        backend: ``"triton"`` (16-bit numbers, and a power of two of runs in a block), ``"cpu"``, ``"reference"`` or
            ``None`` for the fastest.

    Returns:
        float32 ``[B, H, ceil(Sq / block_q), ceil(Sk / block_k)]``.

    Raises:
        ValueError: shapes do not fit, or ``backend`` cannot run here.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_bhsd(name, x)
    if min(tokens, block_q, block_k) < 1 or block_q % tokens or block_k % tokens:
        raise ValueError(f"tokens must divide both blocks, got {tokens=}, {block_q=}, {block_k=}")
    expected = (*query.shape[:2], key.shape[2], query.shape[3])
    if tuple(key.shape) != expected or tuple(value.shape) != expected:
        raise ValueError(f"key and value must be {expected}, got {tuple(key.shape)} and {tuple(value.shape)}")
    if key_valid is not None and key_valid.shape != (key.shape[0], key.shape[2]):
        raise ValueError(f"key_valid must be {(key.shape[0], key.shape[2])}, got {tuple(key_valid.shape)}")
    tables: list[Tensor | None] = []
    for name, x, one in (("order", query, order), ("key_order", key, key_order)):
        if one is not None and (one.table.shape[1] != x.shape[2] or one.head.shape[0] != x.shape[1]):
            raise ValueError(
                f"{name} must hold {x.shape[2]} tokens and {x.shape[1]} heads, "
                f"got {one.table.shape[1]} and {one.head.shape[0]}"
            )
        tables += [None, None] if one is None else [one.table, one.head]
    use_triton = _takes_triton(backend, query, key, value, tokens, block_q, block_k)
    return eager(_fine_spread_op, query)(
        query, key, value, tokens, block_q, block_k, scale, tables, key_valid, use_triton
    )


def _takes_triton(
    backend: str | None, query: Tensor, key: Tensor, value: Tensor, tokens: int, block_q: int, block_k: int
) -> bool:
    """Whether the Triton kernels compute the scores."""
    if resolve_backend(backend, query) != "triton":
        return False
    reason = None
    sizes = (tokens, block_q // tokens, block_k // tokens)
    if not (query.dtype == key.dtype == value.dtype) or query.dtype not in (torch.bfloat16, torch.float16):
        reason = f"dtype must be bfloat16 or float16, got {query.dtype}, {key.dtype} and {value.dtype}"
    elif query.shape[3] > 128:
        reason = f"head_dim must be at most 128, got {query.shape[3]}"
    elif any(n & (n - 1) for n in sizes) or tokens > 32 or max(sizes[1:]) > 32:
        reason = f"tokens and runs in a block must be powers of two up to 32, got {sizes}"
    if reason is not None and backend == "triton":
        raise ValueError(f"backend='triton' cannot run: {reason}")
    return reason is None


@torch.library.custom_op("dit_accel_kernels::fine_spread_scores", mutates_args=())
def _fine_spread_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tokens: int,
    block_q: int,
    block_k: int,
    scale: float,
    orders: list[Tensor | None],
    key_valid: Tensor | None,
    use_triton: bool,
) -> Tensor:
    settings = (query, key, value, tokens, block_q, block_k, scale, orders, key_valid)
    if not use_triton:
        return fine_spread_scores_reference(*settings)
    from .triton import fine_spread_scores_triton

    return fine_spread_scores_triton(*settings)


@_fine_spread_op.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tokens: int,
    block_q: int,
    block_k: int,
    scale: float,
    orders: list[Tensor | None],
    key_valid: Tensor | None,
    use_triton: bool,
) -> Tensor:
    shape = (*query.shape[:2], blocks(query.shape[2], block_q), blocks(key.shape[2], block_k))
    return query.new_empty(shape, dtype=torch.float32)
