"""The meaning of block-sparse attention, in plain torch with every mask spelled out per token."""

from __future__ import annotations

import torch
from torch import Tensor

from ..lists import LEVEL_FULL, LEVEL_PARTIAL, LEVEL_SKIP, levels_from_lists, unpack_bits
from ..types import BlockLists, GatheredKeys, Pooled, TokenOrder, TokenWindows

__all__ = ["block_sparse_reference", "window_mask"]


def window_mask(windows: TokenWindows, rows: Tensor, keys: Tensor) -> Tensor:
    """Say which keys are inside the windows of which queries.

    Args:
        windows: intervals and codes, in block order.
        rows: int64 ``[...]`` positions of queries in block order.
        keys: int64 ``[...]`` positions of keys in block order; broadcasts with ``rows``.

    Returns:
        bool of the broadcast shape.
    """
    seen = windows.k_code[0][keys] < 0
    inside = torch.ones((), dtype=torch.bool, device=rows.device)
    for lo, hi, code in zip(windows.q_lo, windows.q_hi, windows.k_code, strict=True):
        inside = inside & (lo[rows] <= code[keys]) & (code[keys] < hi[rows])
    return seen | inside


def block_sparse_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    *,
    scale: float,
    order: TokenOrder | None = None,
    pooled: Pooled | None = None,
    windows: TokenWindows | None = None,
    key_valid: Tensor | None = None,
    gathered: GatheredKeys | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute block-sparse attention in float32, or in float64 for float64 inputs.

    Args:
        q: ``[B, H, Sq, D]``, natural order.
        k: ``[B, H, Sk, D]``, block order.
        v: ``[B, H, Sk, D]``, block order.
        lists: blocks that each query block visits.
        scale: factor of the logits.
        order: order of the queries.
        pooled: what stands for the blocks that are not visited.
        windows: token windows of partial blocks; without them partial blocks are whole.
        key_valid: bool ``[B, Sk]``, false for padding.
        gathered: further keys, of which each query block sees some groups.

    Returns:
        The output with the strides and dtype of ``q``, and the log-sum-exp, float32 ``[B, H, Sq]``.
    """
    batch, heads, sq, _ = q.shape
    sk, dtype = k.shape[2], torch.float64 if q.dtype == torch.float64 else torch.float32
    bq, bk = lists.block_q, lists.block_k
    levels = levels_from_lists(lists, -(-sk // bk)).expand(batch, heads, -1, -1)
    table = torch.arange(sq, device=q.device).expand(heads, sq)
    if order is not None:
        table = order.table[order.head].long()
    keys = torch.arange(sk, device=q.device)
    chosen = None if gathered is None else _chosen(gathered, bq)
    out = torch.empty_like(q)
    lse = torch.empty(batch, heads, sq, dtype=torch.float32, device=q.device)
    for block in range(levels.shape[2]):
        rows = torch.arange(block * bq, min(block * bq + bq, sq), device=q.device)
        where = table[:, rows].expand(batch, -1, -1)  # [B, H, rows]
        q_rows = q.gather(2, where[..., None].expand(-1, -1, -1, q.shape[3])).to(dtype)
        level = levels[:, :, block, keys // bk, None].transpose(-1, -2)  # [B, H, 1, Sk]
        seen = (level != LEVEL_SKIP).expand(-1, -1, len(rows), -1)
        if windows is not None:
            inside = window_mask(windows, rows[:, None], keys)
            seen = (level == LEVEL_FULL) | ((level == LEVEL_PARTIAL) & inside)
        if key_valid is not None:
            seen = seen & key_valid[:, None, None]
        keys_seen = [(k, v, torch.zeros(1, 1, 1, sk, device=q.device), seen)]
        if pooled is not None:
            exact = unpack_bits(pooled.bits[:, :, block], pooled.k.shape[2])[:, :, None] != 0
            keys_seen.append((pooled.k, pooled.v, pooled.bias[:, :, None], ~exact))
        if gathered is not None and chosen is not None:
            keys_seen.append((gathered.k, gathered.v, gathered.bias[:, :, None], chosen[:, :, block, None]))
        shape = (batch, heads, len(rows), -1)
        all_k, all_v = (torch.cat([x[i] for x in keys_seen], 2) for i in (0, 1))
        bias = torch.cat([x[2].to(dtype).expand(batch, heads, 1, -1) for x in keys_seen], -1)
        seen = torch.cat([(x[3] & (x[2] > -torch.inf)).expand(shape) for x in keys_seen], -1)
        part, part_lse = _attend(q_rows, all_k.to(dtype), all_v.to(dtype), seen, bias, scale)
        out.scatter_(2, where[..., None].expand_as(part), part.to(out.dtype))
        lse.scatter_(2, where, part_lse.float())
    return out, lse


def _chosen(gathered: GatheredKeys, block_q: int) -> Tensor:
    """Say which gathered keys each query block sees: bool ``[B|1, H|1, Qb, Se]``."""
    lists = BlockLists(gathered.row_start, gathered.count, None, gathered.indices, block_q, gathered.group)
    extra = gathered.k.shape[2]
    levels = levels_from_lists(lists, -(-extra // gathered.group))
    return levels.repeat_interleave(gathered.group, -1)[..., :extra] != LEVEL_SKIP


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attend from ``[B, H, R, D]`` under ``seen [B, H, R, S]`` and an additive ``bias``."""
    # A key that no row of this block sees may hold NaN, and 0 * NaN is NaN.
    v = v.masked_fill(~seen.any(2)[..., None], 0)
    logits = (q @ k.transpose(-1, -2)) * scale + bias
    logits = logits.masked_fill(~seen, -torch.inf)
    lse = logits.logsumexp(-1)
    weights = torch.exp(logits - lse.masked_fill(lse == -torch.inf, 0)[..., None])
    return weights @ v, lse
