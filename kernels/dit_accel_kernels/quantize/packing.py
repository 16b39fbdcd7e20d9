"""Layouts of codes: two INT4 codes in a byte, and keys in the order in which tensor cores want 8-bit values."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["operand_order", "pack_int4", "to_operand_order", "unpack_int4"]


def pack_int4(codes: Tensor) -> Tensor:
    """Pack codes of 4 bits, two in a byte: channel ``i`` in the low half, channel ``i + D / 2`` in the high half.

    Halves and not neighbours, so that a kernel can multiply the two halves of a head one after the other without moving
    anything between lanes.

    Args:
        codes: int8 ``[..., D]`` of -8 to 7, ``D`` even.

    Returns:
        uint8 ``[..., D / 2]``.

    Raises:
        ValueError: another dtype, or an odd number of channels.
    """
    if codes.dtype != torch.int8 or codes.shape[-1] % 2:
        raise ValueError(f"codes must be int8 [..., D] with an even D, got {codes.dtype} {list(codes.shape)}")
    low, high = codes.chunk(2, -1)
    return ((low & 15) | (high << 4)).view(torch.uint8)


def unpack_int4(packed: Tensor) -> Tensor:
    """Undo :func:`pack_int4`.

    Args:
        packed: uint8 ``[..., D / 2]``.

    Returns:
        int8 ``[..., D]`` of -8 to 7.

    Raises:
        ValueError: another dtype.
    """
    if packed.dtype != torch.uint8:
        raise ValueError(f"packed codes must be uint8, got {packed.dtype}")
    high = packed.view(torch.int8)
    return torch.cat([(high << 4) >> 4, high >> 4], -1)  # arithmetic shifts extend the sign


def operand_order() -> list[int]:
    """For each of 16 places of an 8-bit operand, the key whose values lie there.

    A thread of an NVIDIA tensor core gets the products of query and key columns ``8b + 2t + e`` (``b, e`` in 0 and 1, ``t``
    its place among four) and must hand in columns ``4t`` to ``4t + 3`` as weights. With key ``8b + 2t + e`` at place
    ``4t + 2b + e`` of the values these are the same registers and no shuffle is needed.
    """
    return [8 * b + 2 * t + e for t in range(4) for b in range(2) for e in range(2)]


def to_operand_order(x: Tensor) -> Tensor:
    """Bring the last dimension, a multiple of 16, into the order of :func:`operand_order`, group by group."""
    groups = x.unflatten(-1, (-1, 2, 4, 2))
    return groups.transpose(-3, -2).flatten(-4)
