"""From levels of blocks to what kernels read: bits, lists and the share of the map, in three launches."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._common import eager, resolve_backend
from ..lists import lists_from_levels, pack_bits
from ..types import BlockLists

__all__ = ["CompressedLevels", "compress_levels"]


class CompressedLevels(NamedTuple):
    """What :func:`compress_levels` returns.

    Attributes:
        bits: int32 ``[B|1, H|1, Qb, ceil(Kb / 32)]``; see :func:`~dit_accel_kernels.lists.pack_bits`.
        lists: see :func:`~dit_accel_kernels.lists.lists_from_levels`.
        density: float32 ``[B|1, H|1]``, share of the map that levels other than 0 cover, by tokens.
    """

    bits: Tensor
    lists: BlockLists
    density: Tensor


def compress_levels(
    levels: Tensor,
    *,
    q_len: int,
    k_len: int,
    block_q: int,
    block_k: int,
    capacity: int | None = None,
    backend: str | None = None,
) -> CompressedLevels:
    """Bits, lists and density of a mask of blocks, without a host synchronisation.

    Args:
        levels: uint8 ``[B|1, H|1, Qb, Kb]`` of ``0`` (skip), ``1`` (exact) and ``255`` (exact, token windows apply).
        q_len: query tokens; ``Qb`` is ``ceil(q_len / block_q)``.
        k_len: key tokens; ``Kb`` is ``ceil(k_len / block_k)``.
        block_q: tokens in a query block.
        block_k: tokens in a key block.
        capacity: upper bound of levels that are not 0; see :func:`~dit_accel_kernels.lists.lists_from_levels`.
        backend: ``"triton"``, ``"cpu"``, ``"reference"`` or ``None`` for the fastest.

    Raises:
        ValueError: dtype, shape or capacity does not fit, or ``backend`` cannot run here.
    """
    if block_q < 1 or block_k < 1:
        raise ValueError(f"block sizes must be positive, got {block_q=}, {block_k=}")
    expected = (-(-q_len // block_q), -(-k_len // block_k))
    if levels.dtype != torch.uint8 or levels.ndim != 4 or tuple(levels.shape[2:]) != expected:
        raise ValueError(
            f"levels must be uint8 [B, H, {expected[0]}, {expected[1]}], got {levels.dtype} {list(levels.shape)}"
        )
    if capacity is not None and capacity < 1:
        raise ValueError(f"capacity must be positive, got {capacity}")
    size = -1 if capacity is None else capacity
    levels = levels.contiguous()
    use_triton = _use_triton(levels, backend)
    found = eager(_compress_op, levels)(levels, q_len, k_len, block_q, block_k, size, use_triton)
    bits, start, full, partial, indices, density = found
    return CompressedLevels(bits, BlockLists(start, full, partial, indices, block_q, block_k), density)


def _use_triton(levels: Tensor, backend: str | None) -> bool:
    # The check of dtypes is for attention: bytes are shown to it as some float of that size.
    return resolve_backend(backend, levels.view(-1).view(torch.float8_e5m2)) == "triton"


def _density(levels: Tensor, q_len: int, k_len: int, block_q: int, block_k: int) -> Tensor:
    sizes = []
    for length, block in ((q_len, block_q), (k_len, block_k)):
        starts = torch.arange(0, length, block, device=levels.device)
        sizes.append(torch.clamp(length - starts, max=block).float())
    return torch.einsum("bhqk,q,k->bh", (levels != 0).float(), *sizes) / (q_len * k_len)


@torch.library.custom_op("dit_accel_kernels::compress_levels", mutates_args=())
def _compress_op(
    levels: Tensor, q_len: int, k_len: int, block_q: int, block_k: int, capacity: int, use_triton: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if not use_triton:
        lists = lists_from_levels(levels, block_q, block_k, capacity=None if capacity < 0 else capacity)
        assert lists.partial is not None
        density = _density(levels, q_len, k_len, block_q, block_k)
        return pack_bits(levels), lists.row_start, lists.full, lists.partial, lists.indices.clone(), density
    from .triton import compress_levels_triton

    return compress_levels_triton(levels, q_len, k_len, block_q, block_k, capacity)


@_compress_op.register_fake
def _(
    levels: Tensor, q_len: int, k_len: int, block_q: int, block_k: int, capacity: int, use_triton: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, cols = levels.shape[:3], levels.shape[3]
    start, full, partial = (levels.new_empty(rows, dtype=torch.int32) for _ in range(3))
    bits = levels.new_empty((*rows, -(-cols // 32)), dtype=torch.int32)
    indices = levels.new_empty((rows.numel() * cols if capacity < 0 else capacity,), dtype=torch.int32)
    return bits, start, full, partial, indices, levels.new_empty(levels.shape[:2], dtype=torch.float32)
