"""Columns of the map that reach an anchor, gathered key by key (AnchorAttention, arXiv 2505.23520)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dit_accel._specs import parse_spec
from dit_accel.compensate import make_compensation
from dit_accel.context import PlanContext
from dit_accel.score._anchor import anchor_blocks, anchor_region, anchor_softmax
from dit_accel.score._blocks import INSIST_SHARE, whole_blocks
from dit_accel.score._registry import SCORES, Gather, Scores
from dit_accel_kernels import gathered_from_mask, pack_bits, unpack_bits
from dit_accel_kernels.scores.reduce import CHUNK_ELEMENTS
from dit_accel_kernels.types import GatheredKeys

__all__ = ["ColumnLists", "span_blocks"]

_SEARCH_STEPS = 24
_ROUNDING = 2e-6  # of sums in float32, less than a column of a span


@SCORES.register("stripes", paper="arXiv 2505.23520", keeps_density=True, gathers=True)
def stripes(ctx: PlanContext, theta: float = 12.0, step: int = 16) -> Scores:
    """Exact blocks around an anchor, and the single keys that come within ``theta`` of it.

    ``step`` query blocks (a span) share a list of columns. The anchor of a query holds the first key block and the keys of
    its own span; ``a_i`` is the mean, over the queries of block ``i``, of their largest logit there. Key ``k`` outside the
    anchor is on the list of the span if ``mean(Q_i) . k * scale + theta >= a_i`` for any of its blocks ``i``. The anchor's
    blocks are insisted on, so the selection is ``"insisted"``. Spans are at most a sixteenth of the sequence, as in the
    long sequences of the paper.

    Where a density is asked for, ``theta`` is searched on the device, one for all heads, so that exact blocks and gathered
    keys together meet it, and a span is short enough for its blocks to take at most half of it.

    Raises:
        ValueError: if the selection could add blocks, or the compensation pools them: their keys would count twice.
    """
    if parse_spec(ctx.method.select).name != "insisted" or make_compensation(ctx.method.compensate).pooled:
        raise ValueError(
            "score 'stripes' chooses keys itself: it goes with select='insisted' and no pooled compensation, got "
            f"select={ctx.method.select!r}, compensate={ctx.method.compensate!r}"
        )
    if step < 1:
        raise ValueError(f"step must be at least 1 query block, got {step}")
    span = span_blocks(ctx, step)
    queries = ctx.queries
    cols, seen = whole_blocks(ctx.keys, ctx.block_k, ctx.valid)
    ids, counts = anchor_blocks(ctx, sink=ctx.block_k, span=span * ctx.block_q, local=0)
    top, _ = anchor_softmax(ctx, queries, cols, seen, ids, counts)
    anchor = _block_mean(top, queries.shape[2], ctx.block_q)
    region = anchor_region(ids, counts, ctx.k_blocks)
    reach = _reach(ctx, cols, seen, anchor, region, span)
    rows = _sizes(queries.shape[2], ctx.block_q, queries.device) * ~ctx.forced.rows
    least = -theta if ctx.density is None else _search(ctx, reach, region, rows, span)
    lists = ColumnLists.of(reach >= least, rows, span)
    ctx.spend(0.5 / ctx.block_q)
    # Zero, unless the queries or keys were not finite, which the plan then reports.
    values = (anchor * 0)[..., None].expand(-1, -1, -1, ctx.k_blocks)
    return Scores(values, insist=region[None, None], gather=Gather(lists.gathered, lists.work))


def span_blocks(ctx: PlanContext, step: int) -> int:
    """Query blocks that share an anchor and a list."""
    most = min(step, max(ctx.q_blocks // 16, 1))
    if ctx.density is None:
        return most
    return max(min(most, int(INSIST_SHARE * ctx.density * ctx.q_blocks) - 1), 1)


def _sizes(tokens: int, block: int, device: torch.device) -> Tensor:
    """Tokens in each block, float32 ``[blocks]``."""
    return (tokens - torch.arange(0, tokens, block, device=device)).clamp(max=block).float()


def _block_mean(x: Tensor, tokens: int, block: int) -> Tensor:
    """Mean over the queries of each block, ``[B, H, Qb * block]`` to ``[B, H, Qb]``; what is behind the end is ignored."""
    there = torch.arange(x.shape[2], device=x.device) < tokens
    sums: Tensor = x.masked_fill(~there, 0).unflatten(2, (-1, block)).sum(3)
    return sums / _sizes(tokens, block, x.device)


def _reach(ctx: PlanContext, cols: Tensor, seen: Tensor, anchor: Tensor, region: Tensor, span: int) -> Tensor:
    """How far each key exceeds the anchors of a span, float32 ``[B, H, spans, S]``; ``-inf`` for keys that are exact."""
    batch, heads, tokens, _ = ctx.queries.shape
    mean = ctx.query_stats.mean.float() * ctx.scale
    keys = cols[:, :, :tokens].float()
    step = max(1, CHUNK_ELEMENTS // (batch * heads * span * tokens)) * span
    found = []
    for first in range(0, ctx.q_blocks, step):
        some = slice(first, first + step)
        over = mean[:, :, some] @ keys.mT - anchor[:, :, some, None]
        over = over.masked_fill(ctx.forced.rows[some, None], -torch.inf)  # text queries see every key
        over = F.pad(over, (0, 0, 0, -over.shape[2] % span), value=-torch.inf)
        found.append(over.unflatten(2, (-1, span)).amax(3))
    exact = (region[::span] | ctx.forced.cols).repeat_interleave(ctx.block_k, 1)[:, :tokens]
    return torch.cat(found, 2).masked_fill_(exact | ~seen[:, :, None, :tokens], -torch.inf)


def _search(ctx: PlanContext, reach: Tensor, region: Tensor, rows: Tensor, span: int) -> Tensor:
    """The threshold, a 0-dim float32 tensor, at which exact blocks and columns together come nearest to the density."""
    tokens, device = ctx.queries.shape[2], reach.device
    all_rows, key_sizes = _sizes(tokens, ctx.block_q, device), _sizes(tokens, ctx.block_k, device)
    exact = (region | ctx.forced.cols | ctx.forced.rows[:, None]).float()
    assert ctx.density is not None
    left = ctx.density - torch.einsum("qk,q,k->", exact, all_rows, key_sizes) / tokens**2
    weight = _by_span(rows, span)
    finite = reach.where(torch.isfinite(reach), 0)
    low, high = finite.amin() - 1, finite.amax() + 1
    for _ in range(_SEARCH_STEPS):
        middle = (low + high) / 2
        work = ((reach >= middle).sum(-1) * weight).sum(-1).mean() / tokens**2
        fits = work <= left + _ROUNDING
        low, high = torch.where(fits, low, middle), torch.where(fits, middle, high)
    return high


def _by_span(rows: Tensor, span: int) -> Tensor:
    """Sums over the query blocks of each span, ``[Qb]`` to ``[spans]``."""
    sums: Tensor = F.pad(rows, (0, -rows.shape[0] % span)).unflatten(0, (-1, span)).sum(1)
    return sums


@dataclass(frozen=True, eq=False)
class ColumnLists:
    """Columns of each span, kept as bits: as lists they would take 32 times the memory between calls.

    Attributes:
        bits: int32 ``[B, H, spans, ceil(S / 32)]``.
        tokens: keys ``S``.
        span: query blocks that share a list.
        sees: bool ``[Qb]``, false for query blocks that see every key exactly.
        work: share of dense attention that the columns cost, float32 ``[B, H]``.
    """

    bits: Tensor
    tokens: int
    span: int
    sees: Tensor
    work: Tensor

    @classmethod
    def of(cls, mask: Tensor, rows: Tensor, span: int) -> ColumnLists:
        """Pack a mask.

        Args:
            mask: bool ``[B, H, spans, S]``.
            rows: float32 ``[Qb]``, queries of each block that look at columns.
            span: query blocks that share a list.
        """
        tokens = mask.shape[3]
        bits = torch.cat([pack_bits(part.to(torch.uint8)) for part in mask.split(_heads(mask.shape), 1)], 1)
        work = (mask.sum(-1) * _by_span(rows, span)).sum(-1) / tokens**2
        return cls(bits, tokens, span, rows > 0, work)

    def gathered(self, key: Tensor, value: Tensor, key_valid: Tensor | None) -> GatheredKeys:
        """The columns of every query block, for keys and values ``[B, H, S, D]`` in block order."""
        batch, heads, spans, _ = self.bits.shape
        start, count, indices, base = [], [], [], 0
        for part in self.bits.split(_heads((batch, heads, spans, self.tokens)), 1):
            rows = gathered_from_mask(unpack_bits(part, self.tokens).bool())
            start.append(rows[0] + base)
            count.append(rows[1])
            indices.append(rows[2])
            base += rows[2].numel()
        place = torch.arange(self.sees.shape[0], device=key.device) // self.span
        bias = torch.zeros(1, 1, self.tokens, device=key.device)
        if key_valid is not None:
            bias = bias.masked_fill(~key_valid[:, None], -torch.inf)
        return GatheredKeys(
            k=key,
            v=value,
            bias=bias,
            row_start=torch.cat(start, 1)[:, :, place].contiguous(),
            count=(torch.cat(count, 1)[:, :, place] * self.sees).to(torch.int32),
            indices=torch.cat(indices),
            group=1,
        )


def _heads(shape: tuple[int, ...]) -> int:
    """Heads to take at a time, so that a number for each entry of a mask ``[B, H, spans, S]`` stays bounded."""
    return max(1, CHUNK_ELEMENTS // (shape[0] * shape[2] * shape[3]))
