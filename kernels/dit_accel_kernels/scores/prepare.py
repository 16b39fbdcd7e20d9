"""Checks and gathers that the scores share."""

from __future__ import annotations

import torch
from torch import Tensor

from .._common import check_bhsd
from ..types import TokenOrder

__all__ = ["check_scores", "query_tokens", "take"]


def check_scores(
    q: Tensor, k: Tensor, block_q: int, block_k: int, scale: float, order: TokenOrder | None, key_valid: Tensor | None
) -> None:
    """Raise ``ValueError`` unless the arguments that all scores share fit each other."""
    check_bhsd("q", q)
    check_bhsd("k", k)
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3] or q.dtype != k.dtype:
        got = f"{tuple(q.shape)} {q.dtype} and {tuple(k.shape)} {k.dtype}"
        raise ValueError(f"q and k must agree in B, H, D and dtype, got {got}")
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(f"no dimension may be empty, got {tuple(q.shape)} and {tuple(k.shape)}")
    if block_q < 1 or block_k < 1:
        raise ValueError(f"blocks must hold at least one token, got {block_q=} and {block_k=}")
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    if order is not None and (order.table.shape[1] != q.shape[2] or order.head.shape[0] != q.shape[1]):
        got = f"{order.table.shape[1]} and {order.head.shape[0]}"
        raise ValueError(f"order must hold {q.shape[2]} tokens and {q.shape[1]} heads, got {got}")
    if key_valid is not None and (key_valid.shape != (k.shape[0], k.shape[2]) or key_valid.dtype != torch.bool):
        got = f"{key_valid.dtype} {tuple(key_valid.shape)}"
        raise ValueError(f"key_valid must be torch.bool {(k.shape[0], k.shape[2])}, got {got}")


def query_tokens(position: Tensor, order: TokenOrder | None, heads: int) -> Tensor:
    """Natural tokens at positions of block order.

    Args:
        position: int64 ``[B|1, H|1, N]``, inside the sequence.
        order: permutation of each head, or ``None``.
        heads: number of heads.

    Returns:
        int64 ``[B|1, H|1, N]``.
    """
    if order is None:
        return position
    table = order.table[order.head.long()].long()[None].expand(position.shape[0], -1, -1)
    return table.gather(2, position.expand(-1, heads, -1))


def take(x: Tensor, token: Tensor, valid: Tensor | None) -> Tensor:
    """Gather tokens of ``[B, H, S, D]``; where ``valid`` is false the result is 0, whatever the token holds.

    Args:
        x: ``[B, H, S, D]``.
        token: int64 ``[B|1, H|1, N]``.
        valid: bool ``[B|1, H|1, N]`` or ``None``.
    """
    batch, heads, _, dim = x.shape
    out = x.gather(2, token.expand(batch, heads, -1)[..., None].expand(-1, -1, -1, dim))
    return out if valid is None else out.masked_fill_(~valid[..., None], 0)
