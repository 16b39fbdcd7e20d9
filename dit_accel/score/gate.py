"""Products of query and key means, not normalised (VMoBA, arXiv 2506.23858; BiFormer, arXiv 2303.08810)."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.context import PlanContext
from dit_accel.score._blocks import lowest_where, own_blocks
from dit_accel.score._registry import SCORES, Scores


def _logits(ctx: PlanContext) -> Tensor:
    """Products of block means, float32 ``[B, H, Qb, Kb]``; the lowest where a key block holds nothing."""
    mean_k, _, count = ctx.key_stats
    logits = torch.einsum("bhqd,bhkd->bhqk", ctx.query_stats.mean.float() * ctx.scale, mean_k.float())
    ctx.spend(0.5 / (ctx.block_q * ctx.block_k))
    return lowest_where(logits, (count == 0)[:, None, None])


@SCORES.register("gate", paper="arXiv 2506.23858")
def gate(ctx: PlanContext) -> Scores:
    """``scale * mean(Q_i) . mean(K_j)``, the gate of VMoBA by blocks of queries; a block always sees its own keys."""
    return Scores(_logits(ctx), insist=own_blocks(ctx)[None, None])


@SCORES.register("region", paper="arXiv 2303.08810")
def region(ctx: PlanContext) -> Scores:
    """BiFormer's affinity of regions: the products of means added up over the heads, one ranking for all of them.

    Adding over the heads gives the product of the means of whole tokens, which is what the paper routes by; it is divided
    by the root of their ``H D`` channels. The softmax over key blocks changes no ranking of a row.
    """
    return Scores((_logits(ctx).sum(1, keepdim=True) * ctx.query.shape[1] ** -0.5).softmax(-1))
