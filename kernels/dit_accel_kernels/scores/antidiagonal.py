"""Sums along antidiagonals of the attention map (XAttention, arXiv 2503.16428)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .._common import blocks, resolve_backend
from ..types import TokenOrder
from .prepare import check_scores, query_tokens, take
from .reduce import CHUNK_ELEMENTS, block_logits
from .reference import antidiagonal_reference

__all__ = ["antidiagonal_scores"]


def antidiagonal_scores(
    q: Tensor,
    k: Tensor,
    *,
    block_q: int,
    block_k: int,
    stride: int = 8,
    scale: float | None = None,
    order: TokenOrder | None = None,
    key_valid: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Share of each key block in the softmax over a strided map of antidiagonal sums (XAttention, arXiv 2503.16428).

    With ``n = stride``, row ``i`` and column ``j`` of the strided map hold the mean logit of the antidiagonal of a cell of
    ``n`` queries and ``n`` keys, ``A[i, j] = scale / n * sum_t q[i n + n - 1 - t] . k[j n + t]``. The score of a pair of
    blocks is the softmax of ``A`` over ``j``, summed over the columns of the key block and averaged over the rows of the
    query block. Each row of scores sums to 1. The paper sums over the rows; within a row of blocks, and so for top-p and
    top-k, that is the same.

    The product costs ``1 / stride`` of that of queries and keys. The strided map is not stored: on the GPU a Triton kernel
    reduces its tiles at once, elsewhere it comes in chunks. Beside a copy of the keys (none if they are contiguous, whole
    and all valid) the working memory is at most five tensors of 64 MiB, or what one query block of each head needs.

    Args:
        q: ``[B, H, Sq, D]`` in natural order, any strides, last dimension contiguous.
        k: ``[B, H, Sk, D]`` in block order, any strides, last dimension contiguous.
        block_q: queries in a query block, a multiple of ``stride``.
        block_k: keys in a key block, a multiple of ``stride``.
        stride: length of an antidiagonal; the paper takes 8 or 16.
        scale: factor of the logits, ``D ** -0.5`` if ``None``.
        order: where the queries of a block are; ``None`` means natural order.
        key_valid: bool ``[B, Sk]`` in block order. Invalid keys and those beyond the end count as 0 in a sum, whatever they
            hold, as the paper pads; a cell without any valid key is not in the softmax.
        backend: ``"triton"``, ``"cpu"``, ``"reference"`` or ``None`` for the fastest.

    Returns:
        float32 ``[B, H, ceil(Sq / block_q), ceil(Sk / block_k)]``; 0 throughout for a batch element without a valid key.

    Raises:
        ValueError: shapes do not fit, a block is no multiple of ``stride``, or ``backend`` cannot run here.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    check_scores(q, k, block_q, block_k, scale, order, key_valid)
    if stride < 1 or block_q % stride or block_k % stride:
        raise ValueError(f"blocks must be multiples of stride={stride}, got {block_q=} and {block_k=}")
    chosen = resolve_backend(backend, q)
    if chosen == "reference":
        return antidiagonal_reference(q, k, block_q, block_k, stride, scale, order, key_valid)
    batch, heads, tokens, dim = q.shape
    cols, seen = _strided_keys(k, block_k, stride, key_valid)
    kb, qb, each = cols.shape[2] * stride // block_k, blocks(tokens, block_q), block_q // stride
    per_row = max(stride * dim, kb if chosen == "triton" else cols.shape[2])
    step = max(1, CHUNK_ELEMENTS // (batch * heads * each * per_row))
    # Row i holds the queries of its cell backwards, so that one product adds up an antidiagonal.
    within = torch.arange(stride - 1, -1, -1, device=q.device)
    out = q.new_empty((batch, heads, qb, kb), dtype=torch.float32)
    for first in range(0, qb, step):
        last = min(qb, first + step)
        cell = torch.arange(first * each, last * each, device=q.device)
        position = (cell[:, None] * stride + within).flatten()
        inside = (position < tokens)[None, None]
        token = query_tokens(position.clamp(max=tokens - 1)[None, None], order, heads)
        rows = take(q, token, inside if last * block_q > tokens else None)
        rows = rows.view(batch, heads, len(cell), stride * dim)
        _, lse = block_logits(rows, cols, block_k // stride, scale / stride, seen, chosen)
        share = lse.softmax(-1).nan_to_num_(0.0) * (cell * stride < tokens)[:, None]
        count = (cell * stride < tokens).view(-1, each).sum(1)
        out[:, :, first:last] = share.unflatten(2, (-1, each)).sum(3) / count[:, None]
    return out


def _strided_keys(k: Tensor, block: int, stride: int, key_valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Keys as ``[B, H, cells, stride * D]`` and the cells that count, ``None`` for all; the last block is filled up."""
    batch, heads, tokens, dim = k.shape
    pad = blocks(tokens, block) * block - tokens
    seen = None
    if key_valid is not None or pad:
        valid = torch.ones(1, tokens, dtype=torch.bool, device=k.device) if key_valid is None else key_valid
        seen = F.pad(valid, (0, pad)).unflatten(1, (-1, stride)).any(2)[:, None]
    if key_valid is not None:
        k = k.masked_fill(~key_valid[:, None, :, None], 0)
    if pad:
        k = F.pad(k, (0, 0, 0, pad))
    return k.reshape(batch, heads, -1, stride * dim), seen
