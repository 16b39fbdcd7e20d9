"""The meaning of the correction at mean queries, in float32, one head at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .._common import blocks
from ..lists import unpack_bits
from ..types import Pooled

__all__ = ["add_rows_reference", "mean_queries_reference", "residual_reference"]


def _places(table: Tensor | None, head: Tensor | None, i_h: int, tokens: int, device: torch.device) -> Tensor:
    """Token at each place of block order, int64 ``[S]``."""
    if table is None or head is None:
        return torch.arange(tokens, device=device)
    return table.index_select(0, head[i_h : i_h + 1])[0].long()


def mean_queries_reference(query: Tensor, table: Tensor | None, head: Tensor | None, block: int) -> Tensor:
    """Mean of the queries of each block, ``[B, H, Qb, D]`` in the dtype of ``query``."""
    batch, heads, tokens, dim = query.shape
    count = blocks(tokens, block)
    sizes = (tokens - torch.arange(count, device=query.device) * block).clamp(max=block)
    means = query.new_empty(batch, heads, count, dim)
    for i_h in range(heads):
        rows = query[:, i_h, _places(table, head, i_h, tokens, query.device)].float()
        sums = F.pad(rows, (0, 0, 0, count * block - tokens)).view(batch, count, block, dim).sum(2)
        means[:, i_h] = (sums / sizes[:, None]).to(query.dtype)
    return means


def residual_reference(
    means: Tensor, key: Tensor, value: Tensor, pooled: Pooled, key_valid: Tensor | None, block_k: int, scale: float
) -> Tensor:
    """See :func:`dit_accel_kernels.query_means.mean_query_residual`, with the means ``[B, H, Qb, D]`` at hand."""
    batch, heads, rows, _ = means.shape
    tokens, cols = key.shape[2], pooled.k.shape[2]
    seen = unpack_bits(pooled.bits, cols).bool().expand(batch, heads, rows, cols)
    bias = pooled.bias.expand(batch, heads, cols)
    found = torch.empty_like(means)
    for i_h in range(heads):
        mean, k, v = means[:, i_h].float(), key[:, i_h].float(), value[:, i_h].float()
        if key_valid is not None:
            k, v = k.masked_fill(~key_valid[..., None], 0), v.masked_fill(~key_valid[..., None], 0)
        logits = mean @ k.mT * scale
        if key_valid is not None:
            logits = logits.masked_fill(~key_valid[:, None], -torch.inf)
        top = logits.amax(-1, keepdim=True)
        weights = torch.exp(logits - top)
        exact = seen[:, i_h].repeat_interleave(block_k, -1)[..., :tokens]
        kept = weights * exact
        hidden = (bias[:, i_h] == -torch.inf)[..., None]
        pool_k, pool_v = (x[:, i_h].float().masked_fill(hidden, 0) for x in (pooled.k, pooled.v))
        extra = torch.exp(mean @ pool_k.mT * scale + bias[:, i_h, None] - top) * ~seen[:, i_h]
        dense = weights @ v / weights.sum(-1, keepdim=True)
        sparse = (kept @ v + extra @ pool_v) / (kept.sum(-1, keepdim=True) + extra.sum(-1, keepdim=True))
        lacks = dense - sparse
        found[:, i_h] = lacks.where(torch.isfinite(lacks), 0).to(means.dtype)
    return found


def add_rows_reference(out: Tensor, rows: Tensor, table: Tensor | None, head: Tensor | None, block: int) -> None:
    """See :func:`dit_accel_kernels.query_means.add_query_means_`."""
    tokens = out.shape[2]
    row = torch.arange(tokens, device=out.device) // block
    for i_h in range(out.shape[1]):
        mine = row
        if table is not None:
            mine = torch.empty_like(row).scatter_(0, _places(table, head, i_h, tokens, out.device), row)
        out[:, i_h] += rows[:, i_h].index_select(1, mine)
