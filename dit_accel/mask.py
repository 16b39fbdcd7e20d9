"""The canonical block mask: one level per block of the attention map."""

from __future__ import annotations

from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from dit_accel_kernels.compress import compress_levels
from dit_accel_kernels.lists import pack_bits, unpack_bits
from dit_accel_kernels.types import BlockLists

__all__ = ["EXACT", "PARTIAL", "SKIP", "BlockMask", "ListCache"]

SKIP = 0
EXACT = 1
PARTIAL = 255


def _block_sizes(length: int, block: int, device: torch.device) -> Tensor:
    """Tokens in each block of a sequence, float32 ``[ceil(length / block)]``; the last may be ragged."""
    starts = torch.arange(0, length, block, device=device)
    return torch.clamp(length - starts, max=block).float()


@dataclass(eq=False)
class BlockMask:
    """Which blocks of an attention map are computed.

    Kept bit-packed; the uint8 levels and the index lists are derived when asked for. Lists are cached until
    :meth:`drop_lists`, so that a plan that is used for many calls derives them once.

    Attributes:
        bits: int32 ``[B|1, H|1, Qb, ceil(Kb / 32)]``; a set bit is a block that is computed.
        partial_bits: like ``bits``, blocks in which token windows apply, or ``None``.
        q_len: query tokens.
        k_len: key tokens.
        block_q: tokens in a query block.
        block_k: tokens in a key block.
        capacity: upper bound of computed blocks known on the host, or ``None``.
    """

    bits: Tensor
    partial_bits: Tensor | None
    q_len: int
    k_len: int
    block_q: int
    block_k: int
    capacity: int | None = None
    _lists: BlockLists | None = field(default=None, repr=False)
    _density: tuple[Tensor, Tensor] | None = field(default=None, repr=False)  # of which bits, and what it is

    @classmethod
    def from_levels(
        cls,
        levels: Tensor,
        q_len: int,
        k_len: int,
        block_q: int,
        block_k: int,
        *,
        capacity: int | None = None,
        partial: bool = False,
    ) -> BlockMask:
        """Make a mask from levels.

        Args:
            levels: uint8 ``[B|1, H|1, Qb, Kb]`` of ``0`` (skip), ``1`` (exact) and ``255`` (exact, token windows apply).
            q_len: query tokens; ``Qb`` must be ``ceil(q_len / block_q)``.
            k_len: key tokens; ``Kb`` must be ``ceil(k_len / block_k)``.
            block_q: tokens in a query block.
            block_k: tokens in a key block.
            capacity: upper bound of non-zero levels, if the host knows one.
            partial: whether levels of 255 occur.

        Raises:
            ValueError: if the dtype or the shape does not fit.
        """
        expected = (-(-q_len // block_q), -(-k_len // block_k))
        if levels.dtype != torch.uint8 or levels.ndim != 4 or tuple(levels.shape[2:]) != expected:
            raise ValueError(
                f"levels must be uint8 [B, H, {expected[0]}, {expected[1]}] for {q_len} x {k_len} tokens in blocks of "
                f"{block_q} x {block_k}, got {levels.dtype} {list(levels.shape)}"
            )
        partial_bits = pack_bits((levels == PARTIAL).to(torch.uint8)) if partial else None
        made = compress_levels(levels, q_len=q_len, k_len=k_len, block_q=block_q, block_k=block_k, capacity=capacity)
        mask = cls(made.bits, partial_bits, q_len, k_len, block_q, block_k, capacity)
        mask._lists, mask._density = made.lists, (made.bits, made.density)
        return mask

    @property
    def key_blocks(self) -> int:
        """Number of key blocks."""
        return -(-self.k_len // self.block_k)

    def levels(self) -> Tensor:
        """Unpack to uint8 ``[B|1, H|1, Qb, Kb]``."""
        levels = unpack_bits(self.bits, self.key_blocks)
        if self.partial_bits is not None:
            levels = torch.where(unpack_bits(self.partial_bits, self.key_blocks) > 0, PARTIAL, levels)
        return levels.to(torch.uint8)

    def lists(self) -> BlockLists:
        """Index lists for the kernels, derived once."""
        if self._lists is None:
            made = compress_levels(
                self.levels(),
                q_len=self.q_len,
                k_len=self.k_len,
                block_q=self.block_q,
                block_k=self.block_k,
                capacity=self.capacity,
            )
            self._lists = made.lists
        return self._lists

    def drop_lists(self) -> None:
        """Forget the index lists; they are derived again when needed."""
        self._lists = None

    def density(self) -> Tensor:
        """Computed share of the attention map, by tokens: float32 ``[B|1, H|1]``, on the mask's device."""
        if self._density is not None and self._density[0] is self.bits:  # a copy may have other bits
            return self._density[1]
        device = self.bits.device
        rows = _block_sizes(self.q_len, self.block_q, device)
        cols = _block_sizes(self.k_len, self.block_k, device)
        kept = (self.levels() != SKIP).float()
        return torch.einsum("bhqk,q,k->bh", kept, rows, cols) / (self.q_len * self.k_len)

    def nbytes(self) -> int:
        """Bytes held, lists included."""
        held = [self.bits, self.partial_bits]
        if self._lists is not None:
            held += [self._lists.indices, self._lists.row_start, self._lists.full, self._lists.partial]
        return sum(t.numel() * t.element_size() for t in held if t is not None)

    def to(self, device: torch.device | str) -> BlockMask:
        """Copy the packed mask to ``device``; lists are not copied."""
        partial = None if self.partial_bits is None else self.partial_bits.to(device)
        return BlockMask(
            self.bits.to(device), partial, self.q_len, self.k_len, self.block_q, self.block_k, self.capacity
        )


class ListCache:
    """Bounds the index lists that masks hold.

    The masks of a model are used in the same order at every step, so dropping what was used longest ago would drop each
    list just before it is needed again. Three quarters of the limit are for lists that stay until their mask is gone;
    further ones pass through the rest, and are derived again at their next use, which takes the device well below a
    hundredth of the attention that they are for. Masks are not kept alive.

    Args:
        limit: bytes of lists and packed masks together; one mask is kept whatever its size.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._stay: WeakKeyDictionary[BlockMask, int] = WeakKeyDictionary()
        self._pass: WeakKeyDictionary[BlockMask, int] = WeakKeyDictionary()

    def touch(self, mask: BlockMask) -> None:
        """Derive the lists of ``mask`` if need be, and drop those of others beyond the limit."""
        if mask in self._stay:
            return
        mask.lists()
        size = self._pass.pop(mask, None) or mask.nbytes()
        staying = sum(self._stay.values())
        if 4 * (staying + size) <= 3 * self.limit:
            self._stay[mask] = size
            return
        self._pass[mask] = size  # the latest is last
        passing = list(self._pass.items())
        over = staying + sum(held for _, held in passing) - self.limit
        for old, held in passing[:-1]:
            if over <= 0:
                break
            old.drop_lists()
            del self._pass[old]
            over -= held

    def keeps(self, mask: BlockMask) -> bool:
        """Whether the lists of a mask stay, so that nothing has to be said of its uses."""
        return mask in self._stay

    def clear(self) -> None:
        """Forget all masks, without touching their lists."""
        self._stay.clear()
        self._pass.clear()
