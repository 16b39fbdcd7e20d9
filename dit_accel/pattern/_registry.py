"""The registry of patterns, what they look at and what they return."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dit_accel._specs import Registry
from dit_accel.geometry import TokenGeometry
from dit_accel_kernels.types import TokenWindows

if TYPE_CHECKING:
    from dit_accel.method import Method

__all__ = ["PATTERNS", "Pattern", "PatternContext", "make_pattern"]


@dataclass(frozen=True, eq=False)
class PatternContext:
    """What a pattern follows from. Everything is on the CPU.

    Attributes:
        method: the method, for its window, stride, dilation and causality.
        geometry: where the tokens sit.
        index: int32 ``[S]`` block order to natural order, or ``None`` for natural order.
        density: share of blocks to visit, or ``None`` where the pattern's own parameters decide.
        heads: attention heads.
        layer: index of the layer, 0 for patterns without the trait ``by_layer``.
    """

    method: Method
    geometry: TokenGeometry
    index: Tensor | None
    density: float | None
    heads: int
    layer: int = 0

    @property
    def block_q(self) -> int:
        """Tokens in a query block."""
        return self.method.block_q

    @property
    def block_k(self) -> int:
        """Tokens in a key block."""
        return self.method.block_k

    @property
    def q_blocks(self) -> int:
        """Number of query blocks ``Qb``."""
        return -(-self.geometry.tokens // self.block_q)

    @property
    def k_blocks(self) -> int:
        """Number of key blocks ``Kb``."""
        return -(-self.geometry.tokens // self.block_k)

    @cached_property
    def coordinates(self) -> Tensor:
        """Frame, row and column of each token in block order, int64 ``[3, S]``; -1 for tokens that are not visual."""
        geometry = self.geometry
        visual = torch.arange(geometry.visual)
        _, height, width = geometry.axes
        found = torch.full((3, geometry.tokens), -1, dtype=torch.int64)
        found[:, geometry.visual_slice] = torch.stack(
            (visual // (height * width), visual // width % height, visual % width)
        )
        return found if self.index is None else found[:, self.index.long()]


@dataclass(frozen=True, eq=False)
class Pattern:
    """A mask that follows from the geometry.

    Attributes:
        levels: uint8 ``[1, 1|H, Qb, Kb]`` on the CPU: 0 skip, 1 exact, 255 exact where :attr:`windows` say so. Blocks with
            tokens that are not visual are added by the caller.
        windows: token windows of the blocks with level 255, on the CPU, or ``None`` if there are none.
    """

    levels: Tensor
    windows: TokenWindows | None = None


PATTERNS: Registry[Pattern] = Registry("pattern")
"""Rules ``(ctx, *values) -> Pattern``.

Traits: ``needs_grid`` (bool, default true): raises without frames, height and width; ``windows`` (bool): may set token
windows, which no pooled compensation can go with; ``by_layer`` (bool): depends on the
layer, so that plans are made for each."""


def make_pattern(ctx: PatternContext) -> Pattern:
    """The pattern of the method.

    Raises:
        ValueError: if the pattern needs a grid and there is none, or its parameters do not fit the grid.
    """
    spec = ctx.method.score
    if ctx.geometry.grid is None and PATTERNS.trait(spec, "needs_grid", True):
        raise ValueError(f"method {ctx.method.name!r} needs frames, height and width, got {ctx.geometry}")
    made = PATTERNS.create(spec, ctx)
    expected = (ctx.q_blocks, ctx.k_blocks)
    if made.levels.dtype != torch.uint8 or tuple(made.levels.shape[2:]) != expected:
        raise ValueError(
            f"pattern {spec!r} must give uint8 [1, H, {expected[0]}, {expected[1]}], "
            f"got {made.levels.dtype} {list(made.levels.shape)}"
        )
    return made
