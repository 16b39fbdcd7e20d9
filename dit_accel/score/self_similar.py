"""Mean pooling for blocks whose tokens are alike, and exact attention for the others (SpargeAttn, arXiv 2502.18137)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dit_accel.context import PlanContext
from dit_accel.score._blocks import INSIST_SHARE, unless_finite
from dit_accel.score._registry import SCORES, Scores
from dit_accel_kernels import block_stats

_STEPS = 32  # the paper's tuner looks at thresholds on a grid of 1/16 from -1 to 1
_DEFAULT = 0.6


@SCORES.register("self_similar", paper="arXiv 2502.18137")
def self_similar(ctx: PlanContext, threshold: float = _DEFAULT) -> Scores:
    """Softmax over block means of queries and smoothed keys; blocks of dissimilar tokens are kept.

    Keys lose their mean over the sequence. The self-similarity of a block is the mean cosine of all pairs of its tokens,
    which is the squared norm of its mean unit vector. Dissimilar key blocks are left out of the softmax; they are kept for
    all queries, and dissimilar query blocks see all keys.

    Where a density is asked for, the threshold is lowered per head, on the grid of the paper's tuner, until the blocks that
    are kept for dissimilarity take at most half of it.
    """
    keys = ctx.keys.float()
    keys = keys - _mean(keys, ctx.valid)
    stats = block_stats(keys, block=ctx.block_k, key_valid=ctx.valid)
    present = (stats.count > 0)[:, None]
    alike_q = _similarity(ctx.queries.float(), ctx.block_q, None)
    alike_k = _similarity(keys, ctx.block_k, ctx.valid).masked_fill(~present, 2.0)  # nothing to be dissimilar
    least = _least(alike_q, alike_k, threshold, ctx.density)
    rows, cols = alike_q < least, alike_k < least
    mean_q = ctx.query_stats.mean.float()
    logits = torch.einsum("bhqd,bhkd->bhqk", mean_q * ctx.scale, stats.mean)
    hidden = cols | ~present
    values = logits.masked_fill(hidden[:, :, None], -torch.inf).softmax(-1)
    # Without any similar key block there is nothing to normalise, and every block is kept.
    values = values.masked_fill(hidden.all(-1)[..., None, None], 0.0)
    ctx.spend(0.5 / (ctx.block_q * ctx.block_k))
    return Scores(values + unless_finite(ctx), insist=rows[..., None] | cols[:, :, None], is_mass=True)


def _mean(keys: Tensor, valid: Tensor | None) -> Tensor:
    if valid is None:
        return keys.mean(2, keepdim=True)
    seen = valid[:, None, :, None]
    return keys.masked_fill(~seen, 0).sum(2, keepdim=True) / seen.sum(2, keepdim=True).clamp(min=1)


def _similarity(x: Tensor, block: int, valid: Tensor | None) -> Tensor:
    """Mean cosine of all pairs of tokens of each block, float32 ``[B, H, blocks]``."""
    return block_stats(F.normalize(x, dim=-1), block=block, key_valid=valid).mean.square().sum(-1)


def _least(alike_q: Tensor, alike_k: Tensor, threshold: float, density: float | None) -> Tensor | float:
    """Self-similarity from which on a block counts as similar: a number, or ``[B, H, 1]``."""
    if density is None:
        return threshold
    grid = torch.arange(_STEPS + 1, device=alike_q.device) / (_STEPS / 2) - 1
    grid = grid.clamp(max=threshold)  # rising; from the threshold on all the same
    rows = (alike_q[..., None] < grid).float().mean(2)  # [B, H, steps]
    cols = (alike_k[..., None] < grid).float().mean(2)
    fits = rows + cols - rows * cols <= INSIST_SHARE * density
    return grid.expand_as(fits).masked_fill(~fits, -1.0).amax(-1, keepdim=True)
