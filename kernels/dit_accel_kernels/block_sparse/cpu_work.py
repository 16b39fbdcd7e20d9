"""Queries, keys and lists laid out for :mod:`.cpu`: every query block a row, every key block a row of a matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..lists import unpack_bits
from ..types import BlockLists, GatheredKeys, Pooled, TokenWindows

__all__ = ["Work", "prepare", "prepare_gathered"]


@dataclass(frozen=True)
class Work:
    """All query blocks of all heads and batch elements as one list of rows, and where their keys are.

    Attributes:
        q: ``[rows, block_q, D]``, block order.
        k: ``[blocks, block_k * D]``: the blocks of every head, then the pooled keys of every head as more blocks.
        v: like ``k``.
        block: int64 ``[rows]``, number of the query block within its head.
        first: int64 ``[rows]``, number in ``k`` of the first block of the row's head.
        count: int ``[rows]``, number of visited blocks.
        groups: numbers of the rows that share a shape, one tensor a shape.
        ids: int64 ``[rows, widest]``, visited blocks within the head, sorted, so that a ragged last block comes last.
        windowed: bool ``[rows, widest]``, blocks in which windows apply.
        pooled: int64 ``[rows, n]``, numbers in ``k`` of the blocks of pooled keys; ``n`` may be 0.
        bias: ``[rows, n * block_k]``, bias of the pooled keys, ``-inf`` for those that are not pooled.
        key_ok: bool ``[B * H * Kb, block_k]`` or ``None``, false for padding.
        key_bias: ``[B * H * Kb, block_k]`` or ``None``, added to the logits of each key.
        windows: token windows or ``None``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    block: Tensor
    first: Tensor
    count: Tensor
    groups: list[Tensor]
    ids: Tensor
    windowed: Tensor
    pooled: Tensor
    bias: Tensor
    key_ok: Tensor | None
    key_bias: Tensor | None
    windows: TokenWindows | None


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    pooled: Pooled | None,
    windows: TokenWindows | None,
    key_valid: Tensor | None,
) -> Work:
    """Lay the inputs out as blocks and group the rows that visit equally many keys."""
    batch, heads, sk, dim = k.shape
    bk = lists.block_k
    qb, kb = lists.full.shape[2], -(-sk // bk)
    shape = (batch, heads, qb)
    key_ok = None
    if key_valid is not None:
        padded = torch.nn.functional.pad(key_valid, (0, kb * bk - sk))
        key_ok = padded.view(batch, 1, kb, bk).expand(-1, heads, -1, -1).reshape(-1, bk)
        k, v = (x.masked_fill(~key_valid[:, None, :, None], 0) for x in (k, v))
    k_blocks, v_blocks = (_blocks(x, kb, bk).view(-1, bk * dim) for x in (k, v))
    more = torch.empty(batch * heads, 0, dtype=torch.int64)
    bias = torch.empty(batch * heads * qb, 0, dtype=q.dtype if q.dtype == torch.float64 else torch.float32)
    if pooled is not None:
        extra = -(-kb // bk)
        more = (batch * heads * kb + torch.arange(batch * heads * extra)).view(-1, extra)
        pooled_k, pooled_v, bias = _pooled(pooled, shape, bk, q.dtype)
        k_blocks = torch.cat([k_blocks, pooled_k.view(-1, bk * dim)])
        v_blocks = torch.cat([v_blocks, pooled_v.view(-1, bk * dim)])
    return _with_rows(
        q, lists, shape, kb, k=k_blocks, v=v_blocks, pooled=more, bias=bias, key_ok=key_ok, windows=windows
    )


def prepare_gathered(q: Tensor, gathered: GatheredKeys, block_q: int) -> Work:
    """Like :func:`prepare`: groups are blocks, and each key has a bias."""
    batch, heads, extra, dim = gathered.k.shape
    lists = BlockLists(gathered.row_start, gathered.count, None, gathered.indices, block_q, gathered.group)
    count = -(-extra // gathered.group)
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    bias = gathered.bias.to(accumulate).expand(batch, heads, extra)
    hidden = (bias == -torch.inf)[..., None]
    k, v = (
        _blocks(x.masked_fill(hidden, 0), count, gathered.group).view(-1, gathered.group * dim)
        for x in (gathered.k, gathered.v)
    )
    shape = (batch, heads, lists.full.shape[2])
    return _with_rows(
        q,
        lists,
        shape,
        count,
        k=k,
        v=v,
        pooled=torch.empty(batch * heads, 0, dtype=torch.int64),
        bias=torch.empty(batch * heads * shape[2], 0, dtype=accumulate),
        key_bias=_blocks(bias[..., None], count, gathered.group).flatten(1),
    )


def _with_rows(
    q: Tensor,
    lists: BlockLists,
    shape: tuple[int, int, int],
    kb: int,
    *,
    pooled: Tensor,
    windows: TokenWindows | None = None,
    key_ok: Tensor | None = None,
    key_bias: Tensor | None = None,
    **keys: Tensor,
) -> Work:
    """Complete the work by its rows: what each visits, and which of them share a shape."""
    batch, heads, qb = shape
    number = torch.arange(batch * heads)
    full = lists.full.expand(shape).flatten()
    count = full if lists.partial is None else full + lists.partial.expand(shape).flatten()
    ids, position = _block_ids(lists, shape, count)
    windowed = (position >= full[:, None]) & (windows is not None)
    # Rows of one group share a shape: as many blocks, ragged at the end or not, with windows or not.
    key = count * 4 + (ids == kb - 1).any(1) * 2 + ((count > full) & (windows is not None))
    member = key.unique(return_inverse=True)[1]
    groups = member.argsort(stable=True).split(torch.bincount(member).tolist())
    return Work(
        q=_blocks(q, qb, lists.block_q),
        block=torch.arange(qb).repeat(batch * heads),
        first=(number * kb).repeat_interleave(qb),
        count=count,
        groups=list(groups),
        ids=ids,
        windowed=windowed,
        pooled=pooled.repeat_interleave(qb, 0),
        windows=windows,
        key_ok=key_ok,
        key_bias=key_bias,
        **keys,
    )


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
