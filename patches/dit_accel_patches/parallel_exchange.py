"""Moving attention between two layouts: every process has some tokens of all heads, or all tokens of some heads.

The first is how diffusers' context parallelism shards a sequence, the second is what attention needs (DeepSpeed-Ulysses,
arXiv 2309.14509). A joint sequence is sharded stream by stream, text and picture each on its own, so what a process holds
is a piece of each, and pieces that are merely joined would stand in the order of the processes. Here each stream is
exchanged into its own place of the sequence, so what arrives is in the order of one process, and nothing is sorted later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from dit_accel_patches.copies import in_one_piece

__all__ = ["Arrival", "Ranks", "Streams", "even_counts"]


def even_counts(total: int, parts: int) -> tuple[int, ...]:
    """``total`` things dealt out to ``parts``, the first ones one more where they do not divide."""
    return tuple(total // parts + (part < total % parts) for part in range(parts))


@dataclass(frozen=True)
class Ranks:
    """The processes that share a sequence.

    Attributes:
        group: their process group; its ranks are in the order of the shards.
        rank: place of this process.
        size: number of processes.
    """

    group: Any
    rank: int
    size: int

    @classmethod
    def of(cls, group: Any) -> Ranks:
        """The processes of a group."""
        return cls(group, dist.get_rank(group), dist.get_world_size(group))

    def join(self, x: Tensor, counts: Sequence[int], dim: int) -> Tensor:
        """The pieces of all processes, ``counts`` long along ``dim``, one behind the other."""
        moved = x.movedim(dim, 0)
        as_sent = moved.to(torch.uint8) if x.dtype == torch.bool else moved
        short = max(counts) - moved.shape[0]
        sent = (F.pad(as_sent, (0, 0) * (x.ndim - 1) + (0, short)) if short else as_sent).contiguous()
        got = sent.new_empty((self.size * sent.shape[0], *sent.shape[1:]))
        dist.all_gather_into_tensor(got, sent, group=self.group)
        if len(set(counts)) > 1:
            got = torch.cat([part[:count] for part, count in zip(got.split(sent.shape[0]), counts, strict=True)])
        return got.to(x.dtype).movedim(0, dim)


@dataclass(frozen=True)
class Arrival:
    """A tensor under way; :meth:`wait` returns it, and drops what was sent, which is as large."""

    works: list[Any]
    buffer: Tensor
    sent: list[Tensor]

    def wait(self) -> Tensor:
        """``[B, S, h, D]``, a view with a contiguous last dimension."""
        for work in self.works:
            work.wait()
        self.works.clear()
        self.sent.clear()
        return self.buffer.transpose(0, 1)


@dataclass(frozen=True)
class Streams:
    """How a sequence lies over the processes.

    Attributes:
        ranks: the processes.
        lengths: tokens of each sharded stream, in the order in which they stand in the sequence.
    """

    ranks: Ranks
    lengths: tuple[int, ...]

    @cached_property
    def chunks(self) -> tuple[tuple[int, ...], ...]:
        """Tokens of each stream on each process; the cut of ``Tensor.tensor_split``."""
        return tuple(even_counts(length, self.ranks.size) for length in self.lengths)

    @property
    def tokens(self) -> int:
        """Tokens of the whole sequence."""
        return sum(self.lengths)

    @property
    def here(self) -> int:
        """Tokens on this process."""
        return sum(chunk[self.ranks.rank] for chunk in self.chunks)

    def to_heads(self, x: Tensor, heads: Sequence[int]) -> Arrival:
        """Send the heads of this process's tokens to where they are computed.

        Args:
            x: ``[B, S / N, H, D]``, heads in the order in which they are dealt out.
            heads: heads of each process.

        Returns:
            The tokens ``[B, S, h, D]`` of this process's heads, under way.
        """
        batch, _, _, dim = x.shape
        mine, row = heads[self.ranks.rank], batch * dim
        buffer = x.new_empty((self.tokens, batch, mine, dim))
        works: list[Any] = []
        sent: list[Tensor] = []
        for part, place, chunk in zip(self._here(x, 1), buffer.split(self.lengths), self.chunks, strict=True):
            tokens = part.shape[1]
            packed = _packed(part, heads)
            sent.append(packed)
            works.append(
                dist.all_to_all_single(
                    place.view(-1),
                    packed,
                    [count * row * mine for count in chunk],
                    [tokens * row * count for count in heads],
                    group=self.ranks.group,
                    async_op=True,
                )
            )
        return Arrival(works, buffer, sent)

    def to_tokens(self, x: Tensor, heads: Sequence[int]) -> Tensor:
        """Undo :meth:`to_heads`: all heads of this process's tokens, ``[B, S / N, H, D]``, in the order of dealing out."""
        batch, _, mine, dim = x.shape
        row, parts = batch * dim, []
        for part, chunk in zip(x.transpose(0, 1).split(self.lengths), self.chunks, strict=True):
            tokens = chunk[self.ranks.rank]
            got = x.new_empty(tokens * row * sum(heads))
            into, outof = [tokens * row * count for count in heads], [count * row * mine for count in chunk]
            dist.all_to_all_single(got, part.contiguous().view(-1), into, outof, group=self.ranks.group)
            if len(set(heads)) == 1:
                whole = got.view(self.ranks.size, tokens, batch, mine, dim).permute(2, 1, 0, 3, 4)
                parts.append(in_one_piece(whole).view(batch, tokens, -1, dim))
            else:
                pieces = [p.view(tokens, batch, n, dim) for p, n in zip(got.split(into), heads, strict=True)]
                parts.append(torch.cat(pieces, 2).transpose(0, 1))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def whole_mask(self, mask: Tensor) -> Tensor:
        """A mask of this process's keys ``[..., S / N]`` for all keys, ``[..., S]``."""
        parts = [
            self.ranks.join(part, chunk, -1) for part, chunk in zip(self._here(mask, -1), self.chunks, strict=True)
        ]
        return torch.cat(parts, -1)

    def _here(self, x: Tensor, dim: int) -> tuple[Tensor, ...]:
        """The pieces of the streams that this process has."""
        parts: tuple[Tensor, ...] = x.split([chunk[self.ranks.rank] for chunk in self.chunks], dim)
        return parts


def _packed(x: Tensor, heads: Sequence[int]) -> Tensor:
    """``[B, S, H, D]`` as one run ``[S, B, h, D]`` for each process, flat."""
    if len(set(heads)) == 1:
        by_process: Tensor = x.unflatten(2, (len(heads), -1)).permute(2, 1, 0, 3, 4)
        return in_one_piece(by_process).view(-1)
    return torch.cat([in_one_piece(part.transpose(0, 1)).view(-1) for part in x.split(list(heads), 2)])
