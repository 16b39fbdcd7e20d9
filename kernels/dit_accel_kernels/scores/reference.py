"""The meaning of the scores, in float32 and with every map whole: for tests and small sequences."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..types import TokenOrder

__all__ = ["antidiagonal_reference", "sampled_reference", "subblock_reference"]


def _in_block_order(q: Tensor, order: TokenOrder | None) -> Tensor:
    if order is None:
        return q.float()
    table = order.table[order.head.long()].long()
    return q.float().gather(2, table[None, :, :, None].expand(q.shape))


def _clean(k: Tensor, key_valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Float32 keys, 0 where invalid, and bool ``[B, Sk]``."""
    if key_valid is None:
        return k.float(), torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device)
    return k.float().masked_fill(~key_valid[:, None, :, None], 0.0), key_valid


def _cells(x: Tensor, block: int, size: int) -> Tensor:
    """``[B, H, S, D]`` with the last block filled up by 0, as ``[B, H, cells, size, D]``."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % block)).unflatten(2, (-1, size))


def antidiagonal_reference(
    q: Tensor,
    k: Tensor,
    block_q: int,
    block_k: int,
    stride: int,
    scale: float,
    order: TokenOrder | None,
    key_valid: Tensor | None,
) -> Tensor:
    """Antidiagonal scores; see :func:`dit_accel_kernels.antidiagonal_scores` for the arguments."""
    keys, valid = _clean(k, key_valid)
    cells_q = _cells(_in_block_order(q, order), block_q, stride).flip(3)
    cells_k = _cells(keys, block_k, stride)
    logits = torch.einsum("bhitd,bhjtd->bhij", cells_q, cells_k) * (scale / stride)
    seen = F.pad(valid, (0, -k.shape[2] % block_k)).unflatten(1, (-1, stride)).any(2)
    logits = logits.masked_fill(~seen[:, None, None], -torch.inf)
    share = logits.softmax(-1).nan_to_num(0.0).unflatten(3, (-1, block_k // stride)).sum(4)
    rows = torch.arange(share.shape[2], device=q.device) * stride < q.shape[2]
    share = (share * rows[:, None]).unflatten(2, (-1, block_q // stride)).sum(3)
    return share / rows.view(-1, block_q // stride).sum(1)[:, None]


def sampled_reference(
    q: Tensor,
    k: Tensor,
    q_index: Tensor,
    k_index: Tensor,
    reduce: str,
    scale: float,
    order: TokenOrder | None,
    key_valid: Tensor | None,
) -> Tensor:
    """Scores of samples; see :func:`dit_accel_kernels.sampled_scores` for the arguments."""
    queries = _in_block_order(q, order)
    keys, valid = _clean(k, key_valid)
    batch, heads = q.shape[:2]
    index_q, index_k = (x.long().expand(heads, -1, -1) for x in (q_index, k_index))
    out = torch.empty(batch, heads, q_index.shape[1], k_index.shape[1], device=q.device)
    for b in range(batch):
        for h in range(heads):
            i, j = index_q[h], index_k[h].flatten()
            mine = (i >= 0) & (i < q.shape[2])
            seen = (j >= 0) & (j < k.shape[2])
            seen = seen & valid[b, j.clamp(0, k.shape[2] - 1)]
            picked = queries[b, h, i.clamp(0, q.shape[2] - 1)]
            logits = picked @ keys[b, h, j.clamp(0, k.shape[2] - 1)].T * scale  # [Qb, n, Kb * m]
            share = logits.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
            share = (share * mine[..., None]).unflatten(2, index_k.shape[1:])
            if reduce == "max":
                out[b, h] = share.amax((1, 3))
            else:
                out[b, h] = share.sum((1, 3)) / mine.sum(1).clamp(min=1)[:, None]
    return out


def subblock_reference(
    q: Tensor,
    k: Tensor,
    block_q: int,
    block_k: int,
    parts: int,
    scale: float,
    order: TokenOrder | None,
    key_valid: Tensor | None,
) -> Tensor:
    """Scores of sub-blocks; see :func:`dit_accel_kernels.subblock_scores` for the arguments."""
    queries = _in_block_order(q, order)
    keys, valid = _clean(k, key_valid)
    mine = torch.ones(1, 1, q.shape[2], 1, device=q.device)
    seen = valid.float()[:, None, :, None]
    count_q, count_k = (_cells(x, n, n // parts).sum(3) for x, n in ((mine, block_q), (seen, block_k)))
    mean_q = _cells(queries, block_q, block_q // parts).sum(3) / count_q.clamp(min=1)
    mean_k = _cells(keys, block_k, block_k // parts).sum(3) / count_k.clamp(min=1)
    logits = mean_q @ mean_k.mT * scale
    logits = logits.masked_fill((count_q == 0) | (count_k == 0).mT, -torch.inf)
    return logits.unflatten(2, (-1, parts)).unflatten(4, (-1, parts)).logsumexp((3, 5))
