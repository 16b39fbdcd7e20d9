"""Block-sparse attention on the CPU: gather the visited blocks, then dense attention over them.

Query blocks that visit equally many keys form one batch, so that a mask needs a handful of calls and none of them computes
a skipped block. The gathered keys of a call stay within the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..lists import unpack_bits
from ..types import BlockLists, Pooled, TokenOrder, TokenWindows
from .reference import window_mask

__all__ = ["block_sparse_cpu"]

_GATHER_BYTES = 8 << 20  # of keys, and as many of values: about a cache; more calls would cost more when cores are busy
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass(frozen=True)
class _Work:
    """All query blocks of all heads and batch elements as one list of rows, and where their keys are.

    Attributes:
        q: ``[rows, block_q, D]``, block order.
        k: ``[blocks, block_k * D]``: the blocks of every head, then the pooled keys of every head as more blocks.
        v: like ``k``.
        block: int64 ``[rows]``, number of the query block within its head.
        first: int64 ``[rows]``, number in ``k`` of the first block of the row's head.
        ids: int64 ``[rows, widest]``, visited blocks within the head, sorted, so that a ragged last block comes last.
        windowed: bool ``[rows, widest]``, blocks in which windows apply.
        pooled: int64 ``[rows, n]``, numbers in ``k`` of the blocks of pooled keys; ``n`` may be 0.
        bias: ``[rows, n * block_k]``, bias of the pooled keys, ``-inf`` for those that are not pooled.
        key_ok: bool ``[B * H * Kb, block_k]`` or ``None``, false for padding.
        windows: token windows or ``None``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    block: Tensor
    first: Tensor
    ids: Tensor
    windowed: Tensor
    pooled: Tensor
    bias: Tensor
    key_ok: Tensor | None
    windows: TokenWindows | None


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

    Returns:
        The output with the strides and dtype of ``q``, and the log-sum-exp, float32 ``[B, H, Sq]``.
    """
    batch, heads, sq, dim = q.shape
    sk, bk = k.shape[2], lists.block_k
    where = None
    q_rows = q
    if order is not None:
        where = order.table[order.head].long().expand(batch, heads, sq)
        q_rows = q.gather(2, where[..., None].expand(q.shape))
    work, count, groups = _prepare(q_rows, k, v, lists, pooled, windows, key_valid)
    out = torch.zeros_like(work.q)
    lse = torch.full(out.shape[:2], -torch.inf)
    pad = -sk % bk
    per_block = bk * dim * q.element_size()
    scratch: tuple[Tensor, Tensor] | None = None
    for rows in groups:
        n = int(count[rows[0]])
        blocks = n + work.pooled.shape[1]
        width = blocks * bk - (pad if n and int(work.ids[rows[0], n - 1]) == sk // bk else 0)
        if width == 0:
            continue
        for part in rows.split(max(1, _GATHER_BYTES // (blocks * per_block))):
            need = len(part) * blocks
            if scratch is None or scratch[0].shape[0] < need:
                scratch = work.k.new_empty(need, bk * dim), work.v.new_empty(need, bk * dim)
            _attend(work, part, n, width, scratch, scale, out, lse)
    out = out.view(batch, heads, -1, dim)[:, :, :sq]
    lse = lse.view(batch, heads, -1)[:, :, :sq]
    result = torch.empty_like(q)
    if where is None:
        return result.copy_(out), lse.contiguous()
    result.scatter_(2, where[..., None].expand(out.shape), out)
    return result, torch.empty(lse.shape).scatter_(2, where, lse)


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    pooled: Pooled | None,
    windows: TokenWindows | None,
    key_valid: Tensor | None,
) -> tuple[_Work, Tensor, list[Tensor]]:
    """Lay the inputs out as blocks and group the rows that visit equally many keys.

    Returns:
        The work, the number of visited blocks of each row, and the rows of each group.
    """
    batch, heads, sk, dim = k.shape
    bq, bk = lists.block_q, lists.block_k
    qb, kb = lists.full.shape[2], -(-sk // bk)
    shape = (batch, heads, qb)
    key_ok = None
    if key_valid is not None:
        padded = torch.nn.functional.pad(key_valid, (0, kb * bk - sk))
        key_ok = padded.view(batch, 1, kb, bk).expand(-1, heads, -1, -1).reshape(-1, bk)
        k, v = (x.masked_fill(~key_valid[:, None, :, None], 0) for x in (k, v))
    k_blocks, v_blocks = (_blocks(x, kb, bk).view(-1, bk * dim) for x in (k, v))
    number = torch.arange(batch * heads)
    more = torch.empty(batch * heads, 0, dtype=torch.int64)
    bias = torch.empty(batch * heads * qb, 0, dtype=q.dtype if q.dtype == torch.float64 else torch.float32)
    if pooled is not None:
        extra = -(-kb // bk)
        more = (batch * heads * kb + torch.arange(batch * heads * extra)).view(-1, extra)
        pooled_k, pooled_v, bias = _pooled(pooled, shape, bk, q.dtype)
        k_blocks = torch.cat([k_blocks, pooled_k.view(-1, bk * dim)])
        v_blocks = torch.cat([v_blocks, pooled_v.view(-1, bk * dim)])
    full = lists.full.expand(shape).flatten()
    count = full if lists.partial is None else full + lists.partial.expand(shape).flatten()
    ids, position = _block_ids(lists, shape, count)
    windowed = (position >= full[:, None]) & (windows is not None)
    # Rows of one group share a shape: as many blocks, ragged at the end or not, with windows or not.
    key = count * 4 + (ids == kb - 1).any(1) * 2 + ((count > full) & (windows is not None))
    member = key.unique(return_inverse=True)[1]
    groups = member.argsort(stable=True).split(torch.bincount(member).tolist())
    work = _Work(
        q=_blocks(q, qb, bq),
        k=k_blocks,
        v=v_blocks,
        block=torch.arange(qb).repeat(batch * heads),
        first=(number * kb).repeat_interleave(qb),
        ids=ids,
        windowed=windowed,
        pooled=more.repeat_interleave(qb, 0),
        bias=bias,
        key_ok=key_ok,
        windows=windows,
    )
    return work, count, list(groups)


def _blocks(x: Tensor, count: int, size: int) -> Tensor:
    """View ``[B, H, S, D]`` as ``[B * H * count, size, D]``, copying only when it must."""
    pad = count * size - x.shape[2]
    x = torch.nn.functional.pad(x, (0, 0, 0, pad)) if pad else x
    return x.reshape(-1, size, x.shape[3])


def _block_ids(lists: BlockLists, shape: tuple[int, int, int], count: Tensor) -> tuple[Tensor, Tensor]:
    """Sort the blocks of each row, full and partial together; also return their places in the list."""
    entry = torch.arange(max(1, int(count.max())))
    start = lists.row_start.expand(shape).flatten().long()
    slot = (start[:, None] + entry).clamp_(max=max(0, lists.indices.numel() - 1))
    listed = entry < count[:, None]
    ids, position = torch.where(listed, lists.indices[slot], 2**31 - 1).long().sort(1)
    return ids, position.masked_fill(~listed, -1)


def _pooled(
    pooled: Pooled, shape: tuple[int, int, int], block: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Lay the pooled keys and values out as blocks, and give the bias of each of them for each row."""
    batch, heads, qb = shape
    kb = pooled.k.shape[2]
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    # A non-finite mean must spoil the rows that pool it and no other: it moves from the key to the bias.
    finite = (pooled.k.isfinite() & pooled.v.isfinite()).all(-1)
    k, v = (
        _blocks(x.masked_fill(~finite[..., None], 0).to(dtype), -(-kb // block), block) for x in (pooled.k, pooled.v)
    )
    bias = pooled.bias.masked_fill(~finite & (pooled.bias > -torch.inf), torch.nan)
    exact = unpack_bits(pooled.bits, kb) != 0
    bias = bias[:, :, None].to(accumulate).expand(*shape, kb).masked_fill(exact, -torch.inf)
    bias = torch.nn.functional.pad(bias, (0, -kb % block), value=-torch.inf)
    return k, v, bias.reshape(batch * heads * qb, -1)


def _bias(work: _Work, part: Tensor, n: int, width: int) -> Tensor | None:
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
    if seen is None and pooled == 0:
        return None
    rows = 1 if seen is None else seen.shape[1]
    bias = torch.zeros(len(part), rows, width, dtype=work.bias.dtype)
    bias[..., :pooled] = work.bias[part, None]
    if seen is not None:
        bias[..., pooled:].masked_fill_(~seen[..., : width - pooled], -torch.inf)
    return bias


def _attend(
    work: _Work,
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
