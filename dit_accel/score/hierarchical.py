"""Blocks chosen inside chosen parents, everything else pooled (LLSA, arXiv 2512.16615, in its training-free form)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dit_accel.context import PlanContext
from dit_accel.score._registry import SCORES, Gather, Scores
from dit_accel_kernels import block_stats, gathered_from_mask
from dit_accel_kernels.types import GatheredKeys

__all__ = ["hierarchical_choice"]

_DEFAULT_SHARE = 0.25


def hierarchical_choice(fine: Tensor, coarse: Tensor, children: int, density: float) -> tuple[Tensor, Tensor]:
    """Best parents of each row, then the best blocks inside them.

    Twice as many children lie in the chosen parents as are kept, so that the second choice has something to choose from.

    Args:
        fine: float32 ``[B, H, Qb, Kb]`` logits of blocks.
        coarse: float32 ``[B, H, Qb, Kp]`` logits of parents, ``Kp = ceil(Kb / children)``.
        children: blocks of a parent.
        density: share of blocks to keep.

    Returns:
        bool ``[B, H, Qb, Kb]`` the blocks kept, and bool ``[B, H, Qb, Kp]`` the parents chosen.
    """
    blocks, parents = fine.shape[-1], coarse.shape[-1]
    keep = min(max(round(density * blocks), 1), blocks)
    wide = min(max(-(-2 * keep // children), 1), parents)
    chosen = torch.zeros_like(coarse, dtype=torch.bool).scatter_(-1, coarse.topk(wide, dim=-1).indices, True)
    inside = chosen.repeat_interleave(children, -1)[..., :blocks]
    best = fine.masked_fill(~inside, -torch.inf).topk(min(keep, blocks), dim=-1).indices
    return torch.zeros_like(fine, dtype=torch.bool).scatter_(-1, best, True) & inside, chosen


def _pooled_logits(ctx: PlanContext, block: int) -> Tensor:
    mean_k, _, count = block_stats(ctx.keys, block=block, key_valid=ctx.valid)
    logits = torch.einsum("bhqd,bhkd->bhqk", ctx.query_stats.mean.float() * ctx.scale, mean_k.float())
    return logits + count.float().log()[:, None, None]


@SCORES.register("hierarchical", paper="arXiv 2512.16615", gathers=True, keeps_density=True)
def hierarchical(ctx: PlanContext, children: int = 8) -> Scores:
    """Top blocks inside top parents, exact; their siblings as one key each; every other parent as one key.

    LLSA's weights of pooled tokens are ``+log(count)`` on their logits. Its training-free form here has blocks of the
    method's size in place of 16 tokens, and a density in place of its fixed top 8. Goes with ``select="insisted"``.

    Raises:
        ValueError: if ``children`` is below 2.
    """
    if isinstance(children, bool) or not isinstance(children, int) or children < 2:
        raise ValueError(f"children must be a number of blocks, at least 2, got {children!r}")
    fine, coarse = _pooled_logits(ctx, ctx.block_k), _pooled_logits(ctx, ctx.block_k * children)
    density = _DEFAULT_SHARE if ctx.density is None else ctx.density
    exact, parents = hierarchical_choice(fine, coarse, children, density)
    whole = exact | ctx.forced.cols | ctx.forced.rows[:, None]
    siblings = parents.repeat_interleave(children, -1)[..., : fine.shape[-1]] & ~whole
    # A parent of which any block is exact, forced ones included, is entered block by block.
    short = -fine.shape[-1] % children
    touched = F.pad(whole, (0, short)).unflatten(-1, (-1, children)).any(-1)
    siblings = siblings | (touched.repeat_interleave(children, -1)[..., : fine.shape[-1]] & ~whole)
    mask = torch.cat((siblings, ~(parents | touched)), -1)
    ctx.spend(0.5 / (ctx.block_q * ctx.block_k) * (1 + 1 / children))
    return Scores(torch.zeros_like(fine), whole, _gather(mask, ctx.block_k, children, ctx.key.shape[2]))


def _gather(mask: Tensor, block: int, children: int, tokens: int) -> Gather:
    rows = gathered_from_mask(mask)

    def keys(key: Tensor, value: Tensor, key_valid: Tensor | None) -> GatheredKeys:
        parts = [
            (block_stats(key, block=size, key_valid=key_valid), block_stats(value, block=size, key_valid=key_valid))
            for size in (block, block * children)
        ]
        pooled_k = torch.cat([k.mean for k, _ in parts], 2)
        pooled_v = torch.cat([v.mean for _, v in parts], 2)
        bias = torch.cat([k.count.float().log() for k, _ in parts], 1)[:, None]
        return GatheredKeys(pooled_k, pooled_v, bias, *rows, 1)

    return Gather(keys, mask.float().sum(-1).mean(-1) / tokens)
