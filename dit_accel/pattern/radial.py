"""Radial Attention (arXiv 2506.19852): the further apart two frames, the narrower the band between them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dit_accel.pattern._diagonals import is_frame_major
from dit_accel.pattern._fit import computed_share, nearest
from dit_accel.pattern._registry import PATTERNS, Pattern, PatternContext

_CHUNK = 1 << 22  # elements of a temporary
_SAMPLED = 48  # query blocks by which a density is met
_BUSY = 0.6  # share of the non-empty columns of a block that over a third of its queries have to see


@dataclass(frozen=True, eq=False)
class RadialRule:
    """Which token pairs are visible: between frames ``D = |i - j|`` apart, positions ``|s - t| < width(D)``.

    With ``P`` tokens a frame and ``g = bit_length(D)`` the natural width is ``N(D) = 2^bit_length(P) / 2^g``.

    * ``D <= 1``: everything.
    * else ``width = max(block, N(D) * decay)``, and nothing at all unless ``D`` is a multiple of ``floor(block / N(D))``,
      where that is above 1.
    * the first frame is a sink.

    ``scale`` multiplies every length of the rule (the width for ``D <= 1``, ``N``, the sink, and the least width, which
    never exceeds ``block``), so that a density can be met; 1 is the paper.
    """

    frames: int
    per_frame: int
    block: int
    decay: float
    sink: bool
    scale: float = 1.0

    @cached_property
    def widths(self) -> Tensor:
        """Width by frame distance, int64 ``[F]``: positions ``|s - t| < width``; 0 where nothing is seen."""
        return torch.tensor([self._width(distance) for distance in range(self.frames)])

    def _width(self, distance: int) -> int:
        if distance <= 1:
            return math.ceil(self.per_frame * self.scale)
        natural = (1 << self.per_frame.bit_length()) / (1 << distance.bit_length()) * self.scale
        if natural < self.block and distance % int(self.block / natural) != 0:
            return 0
        return math.ceil(max(self.block * min(self.scale, 1.0), natural * self.decay))

    @property
    def sink_tokens(self) -> int:
        """Tokens of the first frame that everybody sees."""
        return min(self.per_frame, math.ceil(self.per_frame * self.scale)) if self.sink and self.frames > 1 else 0


@PATTERNS.register("radial", paper="arXiv 2506.19852")
def radial(ctx: PatternContext, decay: float = 0.2, sink: bool = True) -> Pattern:
    """Bands between frames that get narrower with their distance, and frames left out; see :class:`RadialRule`.

    A block is computed, whole, if over 60 % of its non-empty columns are visible to over a third of its queries, as in the
    published code, whose blocks have 128 tokens. Blocks on the diagonal are always computed.

    Args:
        ctx: the pattern's context; tokens must stand in raster order.
        decay: factor of the widths. The paper has 0.2 for Wan 2.1, 0.8 for Wan 2.2 and 0.95 for HunyuanVideo.
        sink: whether every token sees the first frame, as the paper has it for Wan.

    Raises:
        ValueError: another order than raster, or a decay that is not positive.
    """
    if not isinstance(decay, int | float) or isinstance(decay, bool) or decay <= 0:
        raise ValueError(f"decay must be above 0, got {decay!r}")
    if not is_frame_major(ctx) or not _in_raster(ctx):
        raise ValueError(f"radial attention needs order 'raster', got {ctx.method.order}")
    frames, height, width = ctx.geometry.axes
    per_frame = height * width

    def rule(scale: float) -> RadialRule:
        return RadialRule(frames, per_frame, ctx.block_k, float(decay), sink, scale)

    scale = 1.0
    if ctx.density is not None:
        most = 2.0 ** (frames.bit_length() + 1) * max(1 / decay, ctx.block_k / per_frame, 1.0)
        low = math.floor(4 * math.log2(0.5 / per_frame))
        scales = [2 ** (step / 4) for step in range(low, math.ceil(4 * math.log2(most)) + 1)]
        rows = torch.linspace(0, ctx.q_blocks - 1, min(_SAMPLED, ctx.q_blocks)).round().long().unique()
        scale = scales[
            nearest(len(scales), lambda i: computed_share(ctx, _levels(ctx, rule(scales[i]), rows), rows), ctx.density)
        ]
    levels = _levels(ctx, rule(scale), torch.arange(ctx.q_blocks))
    return Pattern(levels.to(torch.uint8)[None, None])


def _in_raster(ctx: PatternContext) -> bool:
    _, height, width = ctx.geometry.axes
    f, h, w = ctx.coordinates
    place = ((f * height + h) * width + w)[f >= 0]
    return bool((place[1:] > place[:-1]).all())


def _levels(ctx: PatternContext, rule: RadialRule, rows: Tensor) -> Tensor:
    """Blocks of some query rows that are computed, bool ``[R, Kb]``."""
    step = max(1, _CHUNK // ctx.geometry.tokens)
    kept = torch.cat([_block_rows(ctx, rule, part) for part in rows.split(step)])
    first, last = rows * ctx.block_q, (rows + 1) * ctx.block_q - 1
    place = torch.arange(ctx.k_blocks) * ctx.block_k
    diagonal = (place <= last[:, None]) & (place + ctx.block_k > first[:, None])
    return kept | diagonal


def _block_rows(ctx: PatternContext, rule: RadialRule, rows: Tensor) -> Tensor:
    """The rule of the published code on whole blocks; the part of a block row in each frame is a run of positions."""
    geometry, per_frame = ctx.geometry, rule.per_frame
    prefix = geometry.prefix if ctx.index is None else 0
    first = (rows * ctx.block_q - prefix).clamp(0, geometry.visual)
    last = (rows * ctx.block_q - prefix + ctx.block_q).clamp(0, geometry.visual)
    place = torch.arange(per_frame, dtype=torch.int32)
    key_frame = torch.arange(rule.frames)
    seen = torch.zeros(len(rows), rule.frames, per_frame, dtype=torch.int32)
    for run in range(ctx.block_q // per_frame + 2):
        frame = first // per_frame + run
        start = torch.maximum(first, frame * per_frame) - frame * per_frame
        stop = torch.minimum(last, (frame + 1) * per_frame) - frame * per_frame
        some = (stop > start).nonzero()[:, 0]  # few block rows reach into a second frame
        start, stop = (x[some, None, None].to(torch.int32) for x in (start, stop))
        # Rows of one width see the same of every frame: count by width, then give each frame its own.
        width = rule.widths.unique()
        counts = torch.minimum(stop, place + width.to(torch.int32)[:, None])
        counts -= torch.maximum(start, place - width.to(torch.int32)[:, None] + 1)
        which = torch.searchsorted(width, rule.widths)[(frame[some, None] - key_frame).abs().clamp(max=rule.frames - 1)]
        seen[some] += counts.clamp_(min=0).gather(1, which[..., None].expand(-1, -1, per_frame))
    queries = (last - first)[:, None]
    flat = seen.view(len(rows), -1)
    flat[:, : rule.sink_tokens] = queries.to(torch.int32)
    columns = torch.zeros(len(rows), ctx.k_blocks * ctx.block_k, dtype=torch.int32)
    columns[:, prefix : prefix + geometry.visual] = flat
    blocks = columns.view(len(rows), -1, ctx.block_k)
    busy = (blocks * 3 > queries[..., None]).sum(-1, dtype=torch.int32)
    filled = (blocks > 0).sum(-1, dtype=torch.int32)
    return busy > filled * _BUSY
