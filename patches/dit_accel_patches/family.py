"""What the adapters of this package say beyond :class:`dit_accel.adapter.Adapter`, still data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dit_accel.adapter import Adapter

__all__ = ["Family", "Size"]


@dataclass(frozen=True)
class Size:
    """A size at which a model is used.

    Attributes:
        name: checkpoint and output size, for example ``"14B, 720p, 81 frames"``.
        grid: frames, rows and columns in tokens.
        extra: text and other tokens in the same attention, at most.
    """

    name: str
    grid: tuple[int, int, int]
    extra: int = 0

    @property
    def tokens(self) -> int:
        """Visual tokens."""
        frames, height, width = self.grid
        return frames * height * width


@dataclass(frozen=True)
class Family(Adapter):
    """An adapter with what the documentation tells about it, and the peculiarities of its attention calls.

    Attributes:
        layout: order of the sequence, for example ``"text | picture"``.
        dense: what of the transformer's attention stays dense, and why.
        head_dim: columns of a head in the published checkpoints.
        sizes: sizes at which the models are used.
        calls: name of a rule of :mod:`dit_accel_patches.calls` for calls that are not one plain sequence.
        outer_mask: whether boolean masks ``[B, 1, S, S]`` are outer products of a vector of valid tokens, so that the
            row of any visual token is that vector.
        refused: classes that cannot be accelerated, with the reason.
    """

    layout: str = "visual"
    dense: str = ""
    head_dim: tuple[int, ...] = (128,)
    sizes: tuple[Size, ...] = ()
    calls: str = ""
    outer_mask: bool = False
    refused: Mapping[str, str] = field(default_factory=dict)
