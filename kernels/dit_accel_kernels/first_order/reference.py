"""The meaning of first-order terms, in float32, one head at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..lists import unpack_bits
from ..types import Pooled

__all__ = ["add_first_order_reference"]


def add_first_order_reference(
    out: Tensor, query: Tensor, lse: Tensor, key: Tensor, value: Tensor, pooled: Pooled, table: Tensor | None,
    head: Tensor | None, key_valid: Tensor | None, more: Tensor | None, block_q: int, block_k: int, scale: float,
    mean_queries: Tensor, lacks: Tensor,
) -> None:  # fmt: skip
    """See :func:`dit_accel_kernels.first_order.add_first_order_`, with mean queries and what they lack at hand."""
    heads, tokens = query.shape[1:3]
    skipped = ~unpack_bits(pooled.bits, pooled.k.shape[2]).bool()
    for i_h in range(heads):
        h = slice(i_h, i_h + 1)
        places = torch.arange(tokens, device=query.device)
        if table is not None and head is not None:
            places = table.index_select(0, head[h])[0].long()
        rows, found = query[:, i_h, places], lse[:, i_h, places]
        mean, middle = _middles(mean_queries[:, i_h].float(), found, block_q)
        bias, keys = (x[:, 0] if x.shape[1] == 1 else x[:, i_h] for x in (pooled.bias, pooled.k))
        skips = skipped[:, 0] if skipped.shape[1] == 1 else skipped[:, i_h]
        weights, centre = _weights(mean, middle, keys, bias, skips, scale)
        covariance = _covariances(key[:, i_h], value[:, i_h], keys, key_valid, block_k)
        matrices = torch.einsum("bij,bjde->bide", weights, covariance)
        apart = rows.float() - mean.repeat_interleave(block_q, 1)[:, :tokens]
        of = torch.arange(tokens, device=query.device) // block_q
        moved = middle[:, of] - found + (apart * centre[:, of]).sum(-1)
        short = -tokens % block_q
        first = (F.pad(apart, (0, 0, 0, short)).unflatten(1, (-1, block_q)) @ matrices).flatten(1, 2)[:, :tokens]
        added = (first + lacks[:, i_h].float()[:, of]) * moved.clamp(max=0).exp()[..., None]
        if more is not None:
            added += more[:, i_h, places].float()
        out[:, i_h, places] = (out[:, i_h, places].float() + added).to(out.dtype)


def _middles(mean: Tensor, lse: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Mean query ``[B, Qb, D]`` and log-sum-exp ``[B, Qb]`` of blocks; 0 and infinity if one of them is not finite."""
    tokens, short = lse.shape[1], -lse.shape[1] % block
    sizes = (tokens - torch.arange(0, tokens, block, device=lse.device)).clamp(max=block)
    middle = F.pad(lse, (0, short)).unflatten(1, (-1, block)).sum(2) / sizes
    wild = ~(mean.isfinite().all(-1) & middle.isfinite())
    return mean.masked_fill(wild[..., None], 0.0), middle.masked_fill(wild, torch.inf)


def _weights(
    mean: Tensor, middle: Tensor, keys: Tensor, bias: Tensor, skipped: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Scaled weights of skipped blocks ``[B, Qb, Kb]`` and the scaled mean key of what is skipped ``[B, Qb, D]``."""
    hidden = bias == -torch.inf
    keys = keys.float().masked_fill(hidden[..., None], 0.0)
    logits = mean @ keys.mT * scale + bias[:, None]
    weights = (logits - middle[..., None]).exp() * (skipped & ~hidden[:, None])
    total = weights.sum(-1, keepdim=True)
    centre = (weights @ keys) * torch.where(total > 1e-30, scale / total.clamp(min=1e-30), 0.0)
    return weights * scale, centre


def _covariances(keys: Tensor, values: Tensor, means: Tensor, valid: Tensor | None, block: int) -> Tensor:
    """Mean over the valid keys of a block of ``(k - k_mean) v``, ``[B, Kb, D, D]``."""
    short = -keys.shape[1] % block
    inside = torch.ones(keys.shape[:2], dtype=torch.bool, device=keys.device) if valid is None else valid
    inside = F.pad(inside, (0, short)).unflatten(1, (-1, block))[..., None]
    k, v = (F.pad(x.float(), (0, 0, 0, short)).unflatten(1, (-1, block)) for x in (keys, values))
    apart = (k - means.float()[:, :, None]).masked_fill(~inside, 0.0)
    return apart.mT @ v.masked_fill(~inside, 0.0) / inside.sum(2).clamp(min=1)[..., None]
