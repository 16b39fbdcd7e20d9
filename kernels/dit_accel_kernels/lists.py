"""Masks of blocks as compressed lists and as bits, without a host synchronisation.

A *level* says what becomes of one pair of a query block and a key block: 0 skips it, 1 computes it whole and 255 computes
it with token windows. Nothing here reads a value on the host; only :func:`validate_levels` does, for tests and debugging.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .types import BlockLists

__all__ = [
    "LEVEL_FULL",
    "LEVEL_PARTIAL",
    "LEVEL_SKIP",
    "gathered_from_mask",
    "levels_from_lists",
    "lists_from_levels",
    "pack_bits",
    "unpack_bits",
    "validate_levels",
]

LEVEL_SKIP = 0
LEVEL_FULL = 1
LEVEL_PARTIAL = 255

_WORD = 32


def _check_levels(levels: Tensor) -> None:
    if levels.ndim != 4 or levels.dtype != torch.uint8:
        raise ValueError(f"levels must be uint8 [B|1, H|1, Qb, Kb], got {levels.dtype} of shape {tuple(levels.shape)}")


def validate_levels(levels: Tensor) -> None:
    """Raise when a level is neither 0, 1 nor 255.

    This reads the result on the host, so it synchronises a GPU: call it where masks are made by hand, not per step.

    Args:
        levels: uint8 ``[B|1, H|1, Qb, Kb]``.

    Raises:
        ValueError: wrong dtype or shape, or an unknown level; the message names the levels found.
    """
    _check_levels(levels)
    known = (levels <= LEVEL_FULL) | (levels == LEVEL_PARTIAL)
    if not bool(known.all()):
        found = sorted(set(levels[~known].tolist()))
        raise ValueError(f"levels must be 0 (skip), 1 (exact) or 255 (windows), got {found[:8]}")


def lists_from_levels(levels: Tensor, block_q: int, block_k: int, *, capacity: int | None = None) -> BlockLists:
    """Compress a mask of blocks into sorted lists.

    Args:
        levels: uint8 ``[B|1, H|1, Qb, Kb]``; 0 skips, 1 is exact, 255 is exact with token windows. Other values are
            treated as 0; :func:`validate_levels` finds them.
        block_q: tokens in a query block.
        block_k: tokens in a key block.
        capacity: an upper bound, known to the host, of the number of visited blocks of the whole mask. Rows are then
            packed without gaps into that many entries. Blocks beyond it are dropped, never read out of bounds. By
            default each row owns ``Kb`` entries, which always suffices.

    Returns:
        Lists on the device of ``levels``; ``partial`` is always present.

    Raises:
        ValueError: wrong dtype, shape, block size or capacity.
    """
    _check_levels(levels)
    if block_q < 1 or block_k < 1:
        raise ValueError(f"block sizes must be positive, got {block_q=}, {block_k=}")
    if capacity is not None and capacity < 1:
        raise ValueError(f"capacity must be positive, got {capacity}")
    rows, kb = levels.shape[:3], levels.shape[3]
    is_full, is_partial = levels == LEVEL_FULL, levels == LEVEL_PARTIAL
    rank_full = is_full.cumsum(-1, dtype=torch.int32)
    rank_partial = is_partial.cumsum(-1, dtype=torch.int32)
    full, partial = rank_full[..., -1], rank_partial[..., -1]
    n_rows = rows.numel()
    if capacity is None:
        size = n_rows * kb
        start = torch.arange(n_rows, dtype=torch.int32, device=levels.device).mul_(kb).view(rows)
    else:
        size = capacity
        count = (full + partial).view(-1)
        start = (count.cumsum(0, dtype=torch.int32) - count).view(rows).clamp_(max=size)
        full = torch.minimum(full, size - start)
        partial = torch.minimum(partial, size - start - full)
    rank = torch.where(is_full, rank_full, rank_full[..., -1:] + rank_partial) - 1
    # One slot behind the end takes everything that is not listed, so the scatter needs no compaction.
    slot = torch.where(is_full | is_partial, start[..., None] + rank, size).clamp_(max=size)
    ids = torch.arange(kb, dtype=torch.int32, device=levels.device).expand(levels.shape)
    indices = torch.zeros(size + 1, dtype=torch.int32, device=levels.device)
    indices.scatter_(0, slot.reshape(-1).long(), ids.reshape(-1))
    return BlockLists(
        row_start=start.contiguous(),
        full=full.contiguous(),
        partial=partial.contiguous(),
        indices=indices[:size],
        block_q=block_q,
        block_k=block_k,
    )


def gathered_from_mask(mask: Tensor, *, capacity: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Compress a mask of groups into the rows of a :class:`~dit_accel_kernels.types.GatheredKeys`, without a host read.

    Args:
        mask: bool ``[B|1, H|1, Qb, G]``, the groups that each query block sees.
        capacity: an upper bound, known to the host, of the number of set entries of the whole mask; groups beyond it are
            dropped. By default each row owns ``G`` entries, which always suffices.

    Returns:
        ``row_start``, ``count`` (both int32 ``[B|1, H|1, Qb]``) and ``indices`` (int32 ``[capacity]``).

    Raises:
        ValueError: wrong dtype, shape or capacity.
    """
    if mask.ndim != 4 or mask.dtype != torch.bool or not mask.shape[3]:
        raise ValueError(f"mask must be bool [B|1, H|1, Qb, G], got {mask.dtype} of shape {tuple(mask.shape)}")
    lists = lists_from_levels(mask.view(torch.uint8), 1, 1, capacity=capacity)
    return lists.row_start, lists.full, lists.indices


def levels_from_lists(lists: BlockLists, kb: int) -> Tensor:
    """Expand lists into a mask of blocks; the inverse of :func:`lists_from_levels`.

    Args:
        lists: lists whose block ids are below ``kb``.
        kb: number of key blocks.

    Returns:
        uint8 ``[B|1, H|1, Qb, kb]`` of levels.
    """
    full = lists.full[..., None]
    visited = full if lists.partial is None else full + lists.partial[..., None]
    entry = torch.arange(kb, dtype=torch.int32, device=full.device)
    slot = (lists.row_start[..., None] + entry).clamp(max=max(lists.indices.numel() - 1, 0)).long()
    # Entries past the end of a row go to a column of their own, which is cut off.
    column = torch.where(entry < visited, lists.indices[slot], kb).long()
    level = torch.where(entry < full, LEVEL_FULL, LEVEL_PARTIAL).to(torch.uint8)
    out = torch.zeros(*full.shape[:3], kb + 1, dtype=torch.uint8, device=full.device)
    return out.scatter_(-1, column, level.expand(column.shape))[..., :kb]


def pack_bits(levels: Tensor) -> Tensor:
    """Pack ``levels != 0`` into words of 32 bits.

    Args:
        levels: any dtype, ``[..., Kb]``.

    Returns:
        int32 ``[..., ceil(Kb / 32)]``; bit ``j % 32`` of word ``j // 32`` is set when block ``j`` is not skipped.
    """
    kb = levels.shape[-1]
    words = -(-kb // _WORD)
    bits = torch.nn.functional.pad((levels != 0).to(torch.int64), (0, words * _WORD - kb))
    shift = torch.arange(_WORD, device=levels.device)
    packed = (bits.view(*levels.shape[:-1], words, _WORD) << shift).sum(-1)
    # int64 sums reach 2**32 - 1: move them into int32's range by hand, the narrowing of an overflow is not defined.
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def unpack_bits(bits: Tensor, kb: int) -> Tensor:
    """Unpack what :func:`pack_bits` made.

    Args:
        bits: int32 ``[..., ceil(kb / 32)]``.
        kb: number of key blocks.

    Returns:
        uint8 ``[..., kb]`` of 0 and 1.

    Raises:
        ValueError: the number of words does not fit ``kb``.
    """
    words = -(-kb // _WORD)
    if bits.shape[-1] != words:
        raise ValueError(f"bits must have ceil({kb} / 32) = {words} words, got {bits.shape[-1]}")
    shift = torch.arange(_WORD, dtype=torch.int32, device=bits.device)
    out = (bits[..., None] >> shift) & 1
    return out.flatten(-2)[..., :kb].to(torch.uint8)
