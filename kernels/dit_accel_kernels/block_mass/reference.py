"""The meaning of block mass and of the log-sum-exp, in float32, without an ``[S, S]`` tensor."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .._common import blocks

__all__ = ["attention_lse_reference", "block_mass_reference", "query_rows"]

_MAX_ELEMENTS = 1 << 24  # of one chunk of logits: 64 MiB


def query_rows(
    rows: Tensor, block_q: int, tokens: int, table: Tensor | None, head: Tensor | None, step: int = 1
) -> tuple[Tensor, Tensor]:
    """Natural token of each row of some query blocks.

    Args:
        rows: int ``[R]``, query blocks.
        block_q: tokens to take of a query block.
        tokens: length of the sequence.
        table: int32 ``[N, S]`` or ``None``, as in ``TokenOrder``.
        head: int32 ``[H]`` or ``None``, as in ``TokenOrder``.
        step: distance of the tokens that are taken; a block holds ``block_q * step``.

    Returns:
        int64 ``[H|1, R * block_q]`` natural token ids (clamped beyond the end) and bool ``[R * block_q]``, false beyond
        the end of the sequence.
    """
    position = (rows.long()[:, None] * block_q + torch.arange(block_q, device=rows.device)).flatten() * step
    inside = position < tokens
    position = position.clamp(max=tokens - 1)
    if table is None or head is None:
        return position[None], inside
    return table[:, position].long()[head.long()], inside


def block_mass_reference(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
    rows: Tensor | None,
    table: Tensor | None,
    head: Tensor | None,
    key_valid: Tensor | None,
    step: int = 1,
) -> Tensor:
    """Softmax mass per block; see :func:`dit_accel_kernels.block_mass` for the arguments.

    ``block_q`` is the number of queries that are taken of a query block, and ``step`` their distance, so that a query
    block holds ``block_q * step``.
    """
    batch, heads, tokens, _ = q.shape
    keys = k.shape[2]
    if rows is None:
        rows = torch.arange(blocks(tokens, block_q * step), device=q.device)
    key_blocks = blocks(keys, block_k)
    visible = torch.ones(batch, keys, dtype=torch.bool, device=q.device) if key_valid is None else key_valid
    out = torch.empty(batch, heads, rows.numel(), key_blocks, dtype=torch.float32, device=q.device)
    chunk = max(1, _MAX_ELEMENTS // max(1, batch * heads * block_q * keys))
    for first in range(0, rows.numel(), chunk):
        token, inside = query_rows(rows[first : first + chunk], block_q, tokens, table, head, step)
        token = token.expand(heads, -1)
        rows_q = q.gather(2, token[None, :, :, None].expand(batch, -1, -1, q.shape[3])).float()
        rows_lse = lse.gather(2, token[None].expand(batch, -1, -1))
        # A row that sees no key has lse = -inf; it says nothing about where the mass is.
        counted = inside & (rows_lse > float("-inf"))  # [B, H, R * block_q]
        p = torch.exp(scale * (rows_q @ k.float().transpose(2, 3)) - rows_lse[..., None])
        p = torch.where(counted[..., None] & visible[:, None, None], p, 0.0)
        p = F.pad(p, (0, key_blocks * block_k - keys))
        summed = p.view(batch, heads, -1, block_q, key_blocks, block_k).sum((3, 5))
        count = counted.view(batch, heads, -1, block_q, 1).sum(3)
        out[:, :, first : first + chunk] = summed / count.clamp(min=1)
    return out


def attention_lse_reference(q: Tensor, k: Tensor, scale: float, key_valid: Tensor | None) -> Tensor:
    """Natural-log normaliser of each query; see :func:`dit_accel_kernels.attention_lse` for the arguments."""
    batch, heads, tokens, _ = q.shape
    out = torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device)
    step = max(1, _MAX_ELEMENTS // max(1, batch * heads * k.shape[2]))
    for first in range(0, tokens, step):
        logits = scale * (q[:, :, first : first + step].float() @ k.float().transpose(2, 3))
        if key_valid is not None:
            logits = torch.where(key_valid[:, None, None], logits, float("-inf"))
        out[:, :, first : first + step] = logits.logsumexp(-1)
    return out
