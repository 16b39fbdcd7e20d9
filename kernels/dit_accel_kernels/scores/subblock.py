"""Log-sum-exp over pairs of sub-block means: SubBlock, as proposed for SGLang by NVIDIA (sgl-project/sglang pull 34148)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .._common import blocks, resolve_backend
from ..permute import permute_tokens
from ..stats import block_stats
from ..types import TokenOrder
from .prepare import check_scores
from .reduce import CHUNK_ELEMENTS, block_logits
from .reference import subblock_reference

__all__ = ["subblock_scores"]


def subblock_scores(
    q: Tensor,
    k: Tensor,
    *,
    block_q: int,
    block_k: int,
    parts: int = 4,
    scale: float | None = None,
    order: TokenOrder | None = None,
    key_valid: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Logarithm of the attention mass of each pair of blocks, estimated from the means of their sub-blocks.

    ``score[i, j] = log sum_{a, b} exp(scale * mean(Q[i, a]) . mean(K[j, b]))`` over the ``parts`` sub-blocks ``a`` of query
    block ``i`` and ``b`` of key block ``j``. With one part it is the score of plain mean pooling. Sub-blocks without a
    valid token are left out; the others count alike, as in the formula, whatever their length.

    The map of sub-blocks is not stored: on the GPU a Triton kernel reduces its tiles at once, elsewhere it comes in chunks.
    The working memory is the means, a copy of the queries if there is an ``order``, and at most five tensors of 64 MiB or
    what one query block of each head needs.

    Args:
        q: ``[B, H, Sq, D]`` in natural order, any strides, last dimension contiguous.
        k: ``[B, H, Sk, D]`` in block order, any strides, last dimension contiguous.
        block_q: queries in a query block, a multiple of ``parts``.
        block_k: keys in a key block, a multiple of ``parts``.
        parts: sub-blocks of a block.
        scale: factor of the logits, ``D ** -0.5`` if ``None``.
        order: where the queries of a block are; ``None`` means natural order.
        key_valid: bool ``[B, Sk]`` in block order; invalid keys count nothing, whatever they hold.
        backend: ``"triton"``, ``"cpu"``, ``"reference"`` or ``None`` for the fastest.

    Returns:
        float32 ``[B, H, ceil(Sq / block_q), ceil(Sk / block_k)]``, natural logarithm; ``-inf`` where a key block has no
        valid key.

    Raises:
        ValueError: shapes do not fit, a block is no multiple of ``parts``, or ``backend`` cannot run here.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    check_scores(q, k, block_q, block_k, scale, order, key_valid)
    if parts < 1 or block_q % parts or block_k % parts:
        raise ValueError(f"blocks must be multiples of parts={parts}, got {block_q=} and {block_k=}")
    chosen = resolve_backend(backend, q)
    if chosen == "reference":
        return subblock_reference(q, k, block_q, block_k, parts, scale, order, key_valid)
    if order is not None:
        q = permute_tokens(q, order, backend=chosen)
    batch, heads, tokens, dim = q.shape
    qb, kb = blocks(tokens, block_q), blocks(k.shape[2], block_k)
    mean_q, _, count_q = block_stats(q, block=block_q // parts, backend=chosen)
    mean_k, _, count_k = block_stats(k, block=block_k // parts, key_valid=key_valid, backend=chosen)
    rows = F.pad(mean_q, (0, 0, 0, qb * parts - mean_q.shape[2]))
    cols = F.pad(mean_k, (0, 0, 0, kb * parts - mean_k.shape[2]))
    seen = F.pad(count_k > 0, (0, kb * parts - count_k.shape[1]))[:, None]
    ours = F.pad(count_q > 0, (0, qb * parts - count_q.shape[1]))
    step = max(1, CHUNK_ELEMENTS // (batch * heads * parts * max(dim, kb if chosen == "triton" else kb * parts)))
    out = q.new_empty((batch, heads, qb, kb), dtype=torch.float32)
    for first in range(0, qb, step):
        part = slice(first * parts, (first + step) * parts)
        _, lse = block_logits(rows[:, :, part].contiguous(), cols, parts, scale, seen, chosen)
        lse.masked_fill_(~ours[:, None, part, None], -torch.inf)
        out[:, :, first : first + step] = lse.unflatten(2, (-1, parts)).logsumexp(3)
    return out
