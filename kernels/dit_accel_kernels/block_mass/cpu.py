"""Block mass and log-sum-exp for CPUs: tiles that stay in the cache, a product and an exponential each."""

from __future__ import annotations

import torch
from torch import Tensor

from .._common import blocks
from .reference import query_rows

__all__ = ["attention_lse_cpu", "block_mass_cpu"]

_TILE_ROWS = 512
_TILE_KEYS = 1024  # 2 MiB of float32; larger tiles leave the cache, smaller ones pay for their thread barriers


def block_mass_cpu(
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
    """Softmax mass per block; see :func:`dit_accel_kernels.block_mass` for the arguments."""
    batch, heads, tokens, dim = q.shape
    keys, key_blocks = k.shape[2], blocks(k.shape[2], block_k)
    if rows is None:
        rows = torch.arange(blocks(tokens, block_q * step), device=q.device)
    out = torch.zeros(batch, heads, rows.numel(), key_blocks, dtype=torch.float32, device=q.device)
    token, inside = query_rows(rows, block_q, tokens, table, head, step)
    token = token.expand(heads, -1)
    row_step = max(1, _TILE_ROWS // block_q)
    key_step = max(1, _TILE_KEYS // block_k)
    # The normaliser rides in the product as one more component: (scale q, -lse) . (k, 1).
    wide_k = torch.ones(keys, dim + 1, dtype=torch.float32, device=k.device)
    for b in range(batch):
        hidden = None if key_valid is None else ~key_valid[b]
        for h in range(heads):
            wide_k[:, :dim] = k[b, h]
            row_lse = lse[b, h, token[h]]
            counted = inside & (row_lse > float("-inf"))
            wide_q = torch.empty(token.shape[1], dim + 1, dtype=torch.float32, device=q.device)
            wide_q[:, :dim] = q[b, h, token[h]]
            wide_q[:, :dim] *= scale
            wide_q[:, dim] = torch.where(counted, -row_lse, float("-inf"))
            for r in range(0, rows.numel(), row_step):
                tile_q = wide_q[r * block_q : (r + row_step) * block_q]
                for j in range(0, key_blocks, key_step):
                    span = slice(j * block_k, min(keys, (j + key_step) * block_k))
                    p = (tile_q @ wide_k[span].T).exp_()
                    per_key = p.view(-1, block_q, p.shape[1]).sum(1)
                    if hidden is not None:
                        per_key.masked_fill_(hidden[span], 0.0)
                    out[b, h, r : r + row_step, j : j + key_step] = _sum_blocks(per_key, block_k)
            count = counted.view(-1, block_q).sum(1).clamp(min=1)
            out[b, h] /= count[:, None]
    return out


def _sum_blocks(per_key: Tensor, block: int) -> Tensor:
    """``[R, keys]`` to ``[R, ceil(keys / block)]``."""
    whole = per_key.shape[1] // block * block
    sums = per_key[:, :whole].view(per_key.shape[0], -1, block).sum(2)
    if whole == per_key.shape[1]:
        return sums
    return torch.cat([sums, per_key[:, whole:].sum(1, keepdim=True)], 1)


def attention_lse_cpu(q: Tensor, k: Tensor, scale: float, key_valid: Tensor | None) -> Tensor:
    """Natural-log normaliser of each query; see :func:`dit_accel_kernels.attention_lse` for the arguments."""
    bias = None
    if key_valid is not None:
        k = k.masked_fill(~key_valid[:, None, :, None], 0.0)
        bias = torch.zeros(key_valid.shape, dtype=q.dtype, device=q.device)
        bias = bias.masked_fill_(~key_valid, float("-inf"))[:, None, None]
    # torch's flash kernel keeps its tiles in registers: even with values that nobody needs it beats products of our own.
    lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, k, attn_mask=bias, scale=scale)[1]
    if key_valid is not None:  # the kernel reports 0 where no key was seen
        lse = torch.where(key_valid.any(1)[:, None, None], lse, float("-inf"))
    return lse.to(torch.float32).contiguous()
