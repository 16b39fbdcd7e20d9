"""The meaning of the expected errors, in float32, some heads at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._common import blocks

__all__ = ["spread_scores_reference"]

_MAP = 1 << 24  # entries of maps of blocks that are made at once


def _moments(
    x: Tensor, block: int, index: Tensor | None, rows: Tensor | None, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance ``[B, H, N, D]`` and size ``[B, H, N]`` of blocks, by the tokens ``[H, S]`` of block order."""
    tokens = x.shape[2]
    if rows is None:
        rows = torch.arange(blocks(tokens, block), device=x.device)
    places = rows.long()[:, None] * block + torch.arange(block, device=x.device)  # [N, block]
    inside = places < tokens
    places = places.clamp(max=tokens - 1)
    means, variances, sizes = [], [], []
    for i_h in range(x.shape[1]):
        token = places if index is None else index[i_h][places]
        seen = inside[None] if valid is None else inside & valid[:, token]
        seen = seen.expand(x.shape[0], -1, -1)
        size = seen.sum(2, dtype=torch.float32)
        count = size.clamp(min=1)[..., None]
        parts = x[:, i_h, token].float().masked_fill(~seen[..., None], 0)  # [B, N, block, D]
        mean = parts.sum(2) / count
        off = (parts - mean[:, :, None]).masked_fill(~seen[..., None], 0)
        means.append(mean)
        variances.append(off.square().sum(2) / count)
        sizes.append(size)
    return torch.stack(means, 1), torch.stack(variances, 1), torch.stack(sizes, 1)


def _index(table: Tensor | None, head: Tensor | None, candidate: int, heads: int) -> Tensor | None:
    """Tokens of block order by head, int64 ``[H, S]``."""
    if table is None:
        return None
    return table[candidate].long().expand(heads, -1) if head is None else table.index_select(0, head).long()


def _scores(
    query: tuple[Tensor, Tensor], key: tuple[Tensor, Tensor, Tensor], value: tuple[Tensor, Tensor], scale: float
) -> Tensor:
    """The formula, from mean and variance of each block."""
    mass = (query[0] @ key[0].mT).mul_(scale).add_(key[2].log()[..., None, :]).softmax(-1)
    deviation = (query[1] @ key[1].mT).clamp_(min=0).sqrt_().mul_(scale)
    output = mass @ value[0]
    near = (value[0].square() + value[1]).sum(-1)[..., None, :]
    far = (output @ value[0].mT).mul_(-2).add_(near).add_(output.square().sum(-1, keepdim=True))
    return mass.mul_(deviation).mul_(far.clamp_(min=0).sqrt_())


def spread_scores_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
    orders: Sequence[Tensor | None],
    rows: Tensor | None,
    key_valid: Tensor | None,
) -> Tensor:
    """See :func:`dit_accel_kernels.spread.spread_scores`."""
    batch, heads = query.shape[:2]
    q_table, q_head, k_table, k_head = orders
    count = k_table.shape[0] if k_table is not None and k_head is None else 1
    q_count = blocks(query.shape[2], block_q) if rows is None else rows.shape[0]
    found = query.new_empty((count, batch, heads, q_count, blocks(key.shape[2], block_k)), dtype=torch.float32)
    step = max(1, _MAP // found[0, :, 0].numel())
    for i_c in range(count):
        q = _moments(query, block_q, _index(q_table, q_head, i_c, heads), rows, None)
        tokens = _index(k_table, k_head, i_c, heads)
        k, v = (_moments(x, block_k, tokens, None, key_valid) for x in (key, value))
        for i in range(0, heads, step):  # some heads at a time, so that what stands between stays small
            some = slice(i, i + step)
            parts = ((x[0][:, some], x[1][:, some], x[2][:, some]) for x in (q, k, v))
            (q_mean, q_variance, _), k_part, (v_mean, v_variance, _) = parts
            found[i_c, :, some] = _scores((q_mean, q_variance), k_part, (v_mean, v_variance), scale)
    return found
