"""The meaning of attention on quantised operands: exact attention on what the codes stand for."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ..block_sparse.reference import block_sparse_reference
from ..quantize import QuantizedQKV, operand_order
from ..types import BlockLists, Pooled, TokenOrder

__all__ = ["dequantize", "quantized_reference"]


def dequantize(made: QuantizedQKV, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """What codes and scales stand for, float32 ``[B, H, S, D]`` in block order.

    Keys lack the mean that was subtracted, queries and keys stay rotated.

    Args:
        made: the quantised tensors.
        head_dim: columns to keep.
    """
    made = made.unpacked()
    tokens = made.k.shape[2]
    q = made.q.float() * made.q_scale[..., None]
    k = made.k.float() * made.k_scale.repeat_interleave(made.block_k, -1)[:, :, :tokens, None]
    if made.precision.pv == "bf16":
        return q[..., :head_dim], k[..., :head_dim], made.v.float()
    order = torch.tensor(operand_order(), device=made.v.device).argsort()
    v = made.v.float().unflatten(-1, (-1, 16))[..., order].flatten(-2)[..., :tokens]
    return q[..., :head_dim], k[..., :head_dim], (v * made.v_scale[..., None]).mT[..., :head_dim]


def quantized_reference(
    q: Tensor,
    made: QuantizedQKV,
    lists: BlockLists,
    *,
    scale: float,
    order: TokenOrder | None = None,
    pooled: Pooled | None = None,
    key_valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend in float32 from dequantised queries to dequantised keys and values.

    The weights are not rounded; a kernel rounds them to 16 or 8 bits. Pooled keys meet the queries as they were given.

    Args:
        q: ``[B, H, Sq, D]``, natural order, for pooled keys and the log-sum-exp.
        made: the quantised tensors, in block order.
        lists: blocks that each query block visits; partial blocks are whole.
        scale: factor of the logits.
        order: order of the queries.
        pooled: what stands for the blocks that are not visited.
        key_valid: bool ``[B, Sk]``, false for padding.

    Returns:
        The output with the strides and dtype of ``q``, and the log-sum-exp, float32 ``[B, H, Sq]``.
    """
    batch, heads, _, dim = q.shape
    codes_q, k, v = dequantize(made, dim)
    natural = codes_q
    if order is not None:
        index = order.table[order.head.long()].long()[None, :, :, None].expand(codes_q.shape)
        natural = torch.empty_like(codes_q).scatter_(2, index, codes_q)
    mean = q.new_zeros((batch, heads, dim), dtype=torch.float32) if made.k_mean is None else made.k_mean
    back = (q.float() * mean[:, :, None]).sum(-1) * scale  # [B, H, Sq]
    if pooled is not None:
        # One softmax over both kinds of keys: columns of zeros keep the 16-bit queries from the codes and vice versa.
        natural = torch.cat([natural, q.float()], -1)
        k, v = F.pad(k, (0, dim)), F.pad(v, (0, dim))
        far = F.pad(pooled.k.float() - mean[:, :, None], (dim, 0))
        pooled = replace(pooled, k=far, v=F.pad(pooled.v.float(), (0, dim)))
    out, lse = block_sparse_reference(
        natural, k, v, lists, scale=scale, order=order, pooled=pooled, key_valid=key_valid
    )
    result = torch.empty_like(q)
    result.copy_(out[..., :dim])
    return result, lse + back
