"""Blocks by the clusters whose tokens they hold (Sparse VideoGen 2, arXiv 2505.18875; Routing, arXiv 2003.05997)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dit_accel.content.kmeans import MEMORY, Clusters
from dit_accel.context import PlanContext
from dit_accel.score._registry import SCORES, Scores
from dit_accel_kernels.types import TokenOrder

__all__ = ["blocks_of_pairs", "mass_before"]

_CHUNK = 1 << 25


def _clusters(ctx: PlanContext, name: str) -> Clusters:
    found = ctx.memory.get(MEMORY)
    if not isinstance(found, Clusters):
        raise ValueError(f"score {name!r} goes with order 'kmeans' or 'routing', got order={ctx.method.order}")
    return found


def mass_before(found: Clusters, scale: float, least: float) -> Tensor:
    """One minus the mass that better key clusters hold, for each pair of clusters, float32 ``[H, Cq, Ck]``.

    The mass of a pair is the softmax over key clusters of ``scale * q . k + log(size)``. A pair is in the top ``p`` of its
    query cluster if its value is above ``1 - p``; the share ``least`` of best key clusters has the value 1.
    """
    ones = torch.ones_like(found.key_label, dtype=torch.float32)
    size = found.key.new_zeros(found.key.shape[:2]).scatter_add_(1, found.key_label, ones)  # whole numbers: exact
    mass = (found.query @ found.key.mT * scale + size.log()[:, None]).softmax(-1)
    order = mass.argsort(dim=-1, descending=True, stable=True)
    ranked = mass.gather(-1, order)
    before = ranked.cumsum(-1) - ranked
    before[..., : max(round(least * mass.shape[-1]), 1)] = 0
    return 1 - torch.empty_like(before).scatter_(-1, order, before)


def blocks_of_pairs(ctx: PlanContext, pairs: Tensor, found: Clusters) -> Tensor:
    """Largest value of the pairs of clusters in each block, float32 ``[1, H, Qb, Kb]``.

    Clusters do not end where blocks do; a block with any token of a chosen pair is chosen, so that nothing the paper
    computes is left out. Blocks without visual tokens get 0.
    """
    padded = F.pad(pairs, (0, 1, 0, 1))
    q_label = _in_blocks(found.query_label, ctx.order, ctx, ctx.block_q, ctx.q_blocks, pairs.shape[1])
    k_label = _in_blocks(found.key_label, ctx.key_order, ctx, ctx.block_k, ctx.k_blocks, pairs.shape[2])
    rows = _reduce(padded, q_label)  # [H, Qb, Ck + 1]
    return _reduce(rows.mT, k_label).mT.contiguous()[None]


def _in_blocks(
    label: Tensor, order: TokenOrder | None, ctx: PlanContext, block: int, blocks: int, padding: int
) -> Tensor:
    """Cluster of each token in block order, int64 ``[H, blocks, block]``; ``padding`` where no visual token is."""
    visual = ctx.geometry.visual
    if order is not None:  # visual tokens come first in every order that moves tokens
        label = label.gather(1, order.table[order.head.long(), :visual].long() - ctx.geometry.prefix)
    return F.pad(label, (0, blocks * block - visual), value=padding).view(-1, blocks, block)


def _reduce(values: Tensor, label: Tensor) -> Tensor:
    """Largest ``values[h, label]``, ``[H, A, C]``, over the tokens of each block: ``[H, blocks, C]``."""
    heads, rows, width = values.shape
    first = torch.arange(heads, device=label.device)[:, None, None] * rows
    flat, place = values.reshape(heads * rows, width), (label + first).flatten(0, 1)
    each = max(_CHUNK // (place.shape[1] * width), 1)
    return torch.cat([flat[part].amax(1) for part in place.split(each)]).view(heads, -1, width)


@SCORES.register("cluster", paper="arXiv 2505.18875", clusters=True, by_head=True)
def cluster(ctx: PlanContext, least: float = 0.1) -> Scores:
    """One minus the mass before a pair of clusters, size-weighted; ``least`` of the key clusters are always kept.

    SVG2's top-p of 0.9 is ``select="threshold:0.1"``.

    Raises:
        ValueError: if ``least`` is no share, or the order has no clusters.
    """
    if not isinstance(least, int | float) or not 0 <= least <= 1:
        raise ValueError(f"least must be a share of the key clusters between 0 and 1, got {least!r}")
    found = _clusters(ctx, "cluster")
    pairs = mass_before(found, ctx.scale, least)
    ctx.spend(0.5 * pairs.shape[1] * pairs.shape[2] / ctx.query.shape[2] ** 2)
    return Scores(blocks_of_pairs(ctx, pairs, found))


@SCORES.register("routed", paper="arXiv 2003.05997", clusters=True, by_head=True)
def routed(ctx: PlanContext) -> Scores:
    """One within a cluster, otherwise how alike the clusters are, below one: ``select="threshold:1"`` stays within."""
    found = _clusters(ctx, "routed")
    alike = (F.normalize(found.query, dim=-1) @ F.normalize(found.key, dim=-1).mT).clamp(-1, 1)
    pairs = (alike + 1) * 0.495
    pairs.diagonal(dim1=1, dim2=2).fill_(1.0)
    return Scores(blocks_of_pairs(ctx, pairs, found))
