"""Block-sparse attention on the CPU: gather the visited blocks, then dense attention over them.

Query blocks that visit equally many keys form one batch, so that a mask needs a handful of calls and none of them computes
a skipped block. The gathered keys of a call stay within the cache. :class:`~dit_accel_kernels.types.GatheredKeys` are a
second sequence with blocks of their own: a pass of the same kind over them, merged by the log-sum-exps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import BlockLists, GatheredKeys, Pooled, TokenOrder, TokenWindows
from .cpu_work import Work, prepare, prepare_gathered
from .reference import window_mask

__all__ = ["block_sparse_cpu"]

_GATHER_BYTES = 8 << 20  # of keys, and as many of values: about a cache; more calls would cost more when cores are busy
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def block_sparse_cpu(
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
    """Compute what :func:`~.reference.block_sparse_reference` means; same arguments and results.

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
    batch, heads, sq, dim = q.shape
    where, q_rows = None, q
    if order is not None:
        where = order.table[order.head].long().expand(batch, heads, sq)
        q_rows = q.gather(2, where[..., None].expand(q.shape))
    out, lse = _run(prepare(q_rows, k, v, lists, pooled, windows, key_valid), scale, k.shape[2])
    if gathered is not None:
        work = prepare_gathered(q_rows, gathered, lists.block_q)
        out, lse = _merge(out, lse, *_run(work, scale, gathered.k.shape[2]))
    out = out.view(batch, heads, -1, dim)[:, :, :sq]
    lse = lse.view(batch, heads, -1)[:, :, :sq]
    result = torch.empty_like(q)
    if where is None:
        return result.copy_(out), lse.contiguous()
    result.scatter_(2, where[..., None].expand(out.shape), out)
    return result, torch.empty(lse.shape).scatter_(2, where, lse)


def _run(work: Work, scale: float, keys: int) -> tuple[Tensor, Tensor]:
    """Attend for all rows of ``work`` over ``keys`` keys: ``[rows, block_q, D]`` and float32 ``[rows, block_q]``."""
    out = torch.zeros_like(work.q)
    lse = torch.full(out.shape[:2], -torch.inf)
    wide = work.k.shape[1]
    bk = wide // out.shape[2]
    pad = -keys % bk
    scratch: tuple[Tensor, Tensor] | None = None
    for rows in work.groups:
        n = int(work.count[rows[0]])
        blocks = n + work.pooled.shape[1]
        width = blocks * bk - (pad if n and int(work.ids[rows[0], n - 1]) == keys // bk else 0)
        if width == 0:
            continue
        for part in rows.split(max(1, _GATHER_BYTES // (blocks * wide * out.element_size()))):
            need = len(part) * blocks
            if scratch is None or scratch[0].shape[0] < need:
                scratch = work.k.new_empty(need, wide), work.v.new_empty(need, wide)
            _attend(work, part, n, width, scratch, scale, out, lse)
    return out, lse


def _merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Join two attentions of the same queries over different keys."""
    lse = torch.logaddexp(lse_a, lse_b)
    safe = lse.masked_fill(lse == -torch.inf, 0.0)  # where neither saw a key, both weights are 0
    weight_a, weight_b = (torch.exp(part - safe)[..., None] for part in (lse_a, lse_b))
    return (out_a * weight_a + out_b * weight_b).to(out_a.dtype), lse


def _bias(work: Work, part: Tensor, n: int, width: int) -> Tensor | None:
    """Build the additive mask ``[rows, block_q | 1, width]`` of a batch of rows, or ``None``."""
    bq, bk = work.q.shape[1], work.k.shape[1] // work.q.shape[2]
    ids, seen = work.ids[part, :n], None
    if work.key_ok is not None:
        seen = work.key_ok[ids + work.first[part, None]].flatten(1)[:, None]
    windowed = work.windowed[part, :n]
    if work.windows is not None and bool(windowed.any()):
        last = work.windows.q_lo.shape[1] - 1
        query = (work.block[part, None] * bq + torch.arange(bq)).clamp_(max=last)
        tokens = (ids[:, :, None] * bk + torch.arange(bk)).flatten(1)
        tokens.clamp_(max=work.windows.k_code.shape[1] - 1)
        inside = window_mask(work.windows, query[:, :, None], tokens[:, None])
        inside |= ~windowed.repeat_interleave(bk, 1)[:, None]
        seen = inside if seen is None else seen & inside
    pooled = work.bias.shape[1]
    if seen is None and pooled == 0 and work.key_bias is None:
        return None
    rows = 1 if seen is None else seen.shape[1]
    bias = torch.zeros(len(part), rows, width, dtype=work.bias.dtype)
    bias[..., :pooled] = work.bias[part, None]
    if work.key_bias is not None:
        own = work.key_bias[ids + work.first[part, None]].flatten(1)[:, None]
        bias[..., pooled:] = own[..., : width - pooled]
    if seen is not None:
        bias[..., pooled:].masked_fill_(~seen[..., : width - pooled], -torch.inf)
    return bias


def _attend(
    work: Work,
    part: Tensor,
    n: int,
    width: int,
    scratch: tuple[Tensor, Tensor],
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Attend from the query blocks ``part`` to their pooled keys and ``n`` blocks, ``width`` keys in all."""
    q = work.q[part, None]
    picked = torch.cat([work.pooled[part], work.ids[part, :n] + work.first[part, None]], 1)
    gathered = [
        torch.index_select(x, 0, picked.flatten(), out=buffer[: picked.numel()]).view(len(part), 1, -1, q.shape[3])[
            :, :, :width
        ]
        for x, buffer in zip((work.k, work.v), scratch, strict=True)
    ]
    bias = _bias(work, part, n, width)
    mask = None if bias is None else bias.expand(-1, q.shape[2], -1)[:, None]
    part_out, part_lse = _flash(q, *gathered, attn_mask=mask, scale=scale)
    part_out, part_lse = part_out[:, 0], part_lse[:, 0].float()
    if bias is not None:
        blind = (bias == -torch.inf).all(2).expand(part_lse.shape)
        part_out = part_out.masked_fill(blind[..., None], 0)
        part_lse = part_lse.masked_fill(blind, -torch.inf)
    out[part], lse[part] = part_out, part_lse
