"""Four-bit logits against an anchor that is known exactly (SALE, arXiv 2505.24179)."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.context import PlanContext
from dit_accel.score._anchor import anchor_blocks, anchor_region, anchor_softmax
from dit_accel.score._blocks import largest_of_rows, row_reductions, whole_blocks, within_budget
from dit_accel.score._registry import SCORES, Scores

__all__ = ["quantised"]

_LOWEST = -100.0
_TINY = 1e-30


@SCORES.register("low_bit", paper="arXiv 2505.24179", cost=0.5)
def low_bit(ctx: PlanContext, bits: int = 4, sink: int = 128, local: int = 128) -> Scores:
    """Largest logarithm, over the pairs of a block, of the approximate weight relative to the anchor's sum.

    Keys lose their mean over the sequence. Queries are rounded to ``bits`` bits by token and keys by block of keys,
    symmetrically: ``x ~ s * n`` with integers ``|n| <= N = 2 ** (bits - 1) - 1`` and ``s = absmax / N``. The anchor of a
    query holds the first ``sink`` tokens and its block with half of ``local`` on each side; its softmax is exact, with
    maximum ``m`` and sum ``l``. The score is ``max(s_q s_k n_q . n_k * scale - m - log l)``, so that a score above
    ``log tau`` is SALE's criterion (selection ``relative:tau``). The anchor's blocks are kept.

    The products of integers are exact, as on tensor cores of four bits, but computed in wider types: this costs ``Q K^T``
    once more, and no speed is claimed for it.

    Raises:
        ValueError: if ``bits`` is not from 2 to 8, or a number of tokens is negative.
    """
    if not 2 <= bits <= 8 or sink < 0 or local < 0:
        raise ValueError(f"low_bit needs bits from 2 to 8 and sink, local >= 0, got {bits=}, {sink=}, {local=}")
    queries, keys, seen = ctx.queries, *_smoothed(ctx)
    ids, counts = anchor_blocks(ctx, sink=sink, span=ctx.block_q, local=local // 2)
    _, anchor = anchor_softmax(ctx, queries, keys, seen, ids, counts)
    steps = 2 ** (bits - 1) - 1
    cols, key_scale = quantised(keys.unflatten(2, (-1, ctx.block_k)), (3, 4), steps)
    rows, row_scale = quantised(queries, (3,), steps)
    # Small integers are exact in every floating-point type, and so are their sums in float32.
    rows, cols = rows.to(ctx.query.dtype), cols.flatten(2, 3).to(ctx.query.dtype)
    found = []
    for _, part, top, _ in row_reductions(rows, cols, seen, block_q=ctx.block_q, block_k=ctx.block_k, scale=1.0):
        approx = top * row_scale[:, :, part] * (key_scale[:, :, None, :, 0, 0] * ctx.scale)
        found.append(largest_of_rows(approx - anchor[:, :, part, None], ctx.block_q))
    ctx.spend(0.5)
    values = torch.cat(found, 2)
    values = values.clamp(min=_LOWEST).masked_fill((ctx.key_stats.count == 0)[:, None, None], _LOWEST)
    region = anchor_region(ids, counts, ctx.k_blocks)
    return Scores(values, insist=within_budget(region[None, None], values, ctx.density))


def quantised(x: Tensor, dims: tuple[int, ...], steps: int) -> tuple[Tensor, Tensor]:
    """Round symmetrically: integers from ``-steps`` to ``steps`` as float32, and their scale, kept over ``dims``."""
    scale = x.float().abs().amax(dims, keepdim=True) / steps
    return (x.float() / scale.clamp(min=_TINY)).round().clamp(-steps, steps), scale


def _smoothed(ctx: PlanContext) -> tuple[Tensor, Tensor]:
    """Keys less their mean in whole blocks, ``[B, H, Kb * block_k, D]``, 0 where there is none, and which count."""
    keys, seen = whole_blocks(ctx.keys, ctx.block_k, ctx.valid)
    there = seen[..., None]
    wide = keys.float()
    mean = wide.masked_fill(~there, 0).sum(2, keepdim=True) / there.sum(2, keepdim=True).clamp(min=1)
    return (wide - mean).masked_fill(~there, 0), seen
