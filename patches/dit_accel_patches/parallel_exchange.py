"""Moving attention between two layouts: every process has some tokens of all heads, or all tokens of some heads.

The first is how diffusers' context parallelism shards a sequence, the second is what attention needs (DeepSpeed-Ulysses,
arXiv 2309.14509). A joint sequence is sharded stream by stream, text and picture each on its own, so what a process holds
is a piece of each, and pieces that are merely joined would stand in the order of the processes. Here each stream is
exchanged into its own place of the sequence, so what arrives is in the order of one process, and nothing is sorted later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from dit_accel.copies import copy_wide_, in_one_piece

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

    def swap(self, sent: Mapping[int, Sequence[Tensor]], got: Mapping[int, Sequence[Tensor]]) -> list[Any]:
        """Send contiguous tensors to other processes of the group, and receive theirs in the same order, all at once.

        A collective exchange would also pass through its wires what each process keeps, which is half of everything where
        there are two.
        """
        ops = []
        for rank in sorted({*sent, *got}):
            peer = dist.get_global_rank(self.group, rank)
            ops += [dist.P2POp(dist.isend, x, peer, self.group) for x in sent.get(rank, ()) if x.numel()]
            ops += [dist.P2POp(dist.irecv, x, peer, self.group) for x in got.get(rank, ()) if x.numel()]
        return dist.batch_isend_irecv(ops) if ops else []

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
        me = self.ranks.rank
        buffer = x.new_empty((self.tokens, batch, heads[me], dim))
        sent: dict[int, list[Tensor]] = {}
        got: dict[int, list[Tensor]] = {}
        own: list[tuple[Tensor, Tensor]] = []
        for part, place, chunk in zip(self._here(x, 1), buffer.split(self.lengths), self.chunks, strict=True):
            for rank, (piece, room) in enumerate(zip(part.split(list(heads), 2), place.split(chunk), strict=True)):
                if rank == me:
                    own.append((room, piece.transpose(0, 1)))
                else:
                    sent.setdefault(rank, []).append(in_one_piece(piece.transpose(0, 1)))
                    got.setdefault(rank, []).append(room)
        works = self.ranks.swap(sent, got)
        for room, piece in own:  # while the others are under way
            copy_wide_(room, piece)
        return Arrival(works, buffer, [piece for pieces in sent.values() for piece in pieces])

    def to_tokens(self, x: Tensor, heads: Sequence[int]) -> Tensor:
        """Undo :meth:`to_heads`: all heads of this process's tokens, ``[B, S / N, H, D]``, in the order of dealing out."""
        batch, _, _, dim = x.shape
        me = self.ranks.rank
        out = x.new_empty((batch, self.here, sum(heads), dim))
        sent: dict[int, list[Tensor]] = {}
        got: dict[int, list[Tensor]] = {}
        moves: list[tuple[Tensor, Tensor]] = []
        own: list[tuple[Tensor, Tensor]] = []
        streams = x.transpose(0, 1).split(self.lengths)
        for part, place, chunk in zip(streams, self._here(out, 1), self.chunks, strict=True):
            for rank, (piece, room) in enumerate(zip(part.split(chunk), place.split(list(heads), 2), strict=True)):
                if rank == me:
                    own.append((room, piece.transpose(0, 1)))
                    continue
                arrived = x.new_empty((chunk[me], batch, heads[rank], dim))
                sent.setdefault(rank, []).append(in_one_piece(piece))
                got.setdefault(rank, []).append(arrived)
                moves.append((room, arrived.transpose(0, 1)))
        works = self.ranks.swap(sent, got)
        for room, piece in own:
            copy_wide_(room, piece)
        for work in works:
            work.wait()
        for room, piece in moves:
            copy_wide_(room, piece)
        return out

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
