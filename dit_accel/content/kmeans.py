"""Tokens grouped by k-means (Sparse VideoGen 2, arXiv 2505.18875; Routing Transformer, arXiv 2003.05997)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dit_accel.content._registry import CONTENT_ORDERS, ContentOrder, head_order
from dit_accel.context import PlanContext

__all__ = ["MEMORY", "Clusters", "lloyd"]

#: Where the clusters of a layer, branch and batch element are kept, for the score and for the next plan.
MEMORY = "kmeans"

_CHUNK = 1 << 25
# SVG2's 300 query and 1000 key clusters for Wan's 75,600 tokens; other lengths have as many tokens in a cluster.
_QUERY_TOKENS, _KEY_TOKENS = 252, 76
_PLANS = 24  # of a run of 30 steps after its warm-up, over which the first plan's cost is spread


@dataclass(frozen=True, eq=False)
class Clusters:
    """Clusters of the visual tokens of each head.

    Attributes:
        query: float32 ``[H, Cq, D]``, centroids of the queries.
        key: float32 ``[H, Ck, D]``, centroids of the keys.
        query_label: int64 ``[H, V]``, cluster of each visual query, in natural order.
        key_label: int64 ``[H, V]``, cluster of each visual key.
    """

    query: Tensor
    key: Tensor
    query_label: Tensor
    key_label: Tensor


def _rows(x: Tensor, centroids: Tensor) -> int:
    """Tokens of every head that are compared with the centroids at once."""
    return max(_CHUNK // (x.shape[0] * centroids.shape[1]), 1)


def _assign(x: Tensor, centroids: Tensor) -> Tensor:
    """Nearest centroid of each token, int64 ``[H, V]``; of several equally near the first."""
    offset = centroids.square().sum(-1)[:, None] / 2
    parts = x.split(_rows(x, centroids), 1)
    return torch.cat([torch.baddbmm(offset, part, centroids.mT, beta=-1).argmax(-1) for part in parts], 1)


def _means(x: Tensor, label: Tensor, centroids: Tensor) -> Tensor:
    """Mean of each cluster; an empty one keeps its centroid. By products, which are deterministic."""
    total, count = torch.zeros_like(centroids), torch.zeros_like(centroids[..., 0])
    numbers = torch.arange(centroids.shape[1], device=x.device)
    rows = _rows(x, centroids)
    for part, mine in zip(x.split(rows, 1), label.split(rows, 1)):
        member = (mine[..., None] == numbers).to(x.dtype)
        total += member.mT @ part
        count += member.sum(1)
    return torch.where((count > 0)[..., None], total / count.clamp(min=1)[..., None], centroids)


def lloyd(x: Tensor, centroids: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm, for all heads at once.

    Args:
        x: float32 ``[H, V, D]``.
        centroids: float32 ``[H, C, D]``, where to begin.
        iterations: how often to assign and average.

    Returns:
        The centroids ``[H, C, D]`` and the labels int64 ``[H, V]``, nearest to these centroids.
    """
    for _ in range(iterations):
        centroids = _means(x, _assign(x, centroids), centroids)
    return centroids, _assign(x, centroids)


def _spread(x: Tensor, count: int) -> Tensor:
    """Evenly spread tokens as first centroids: k-means++ would need a draw for each."""
    places = ((torch.arange(count, device=x.device) + 0.5) * x.shape[1] / count).long()
    return x[:, places]


def _clusters(ctx: PlanContext, queries: int, keys: int, first: int, later: int) -> Clusters:
    part = ctx.geometry.visual_slice
    q, k = ctx.query[0, :, part].float(), ctx.key[0, :, part].float()
    tokens = q.shape[1]
    known = ctx.memory.get(MEMORY)
    rounds = first if known is None else later
    cq = min(queries or max(round(tokens / _QUERY_TOKENS), 4), tokens)
    ck = min(keys or max(round(tokens / _KEY_TOKENS), 8), tokens)
    query, query_label = lloyd(q, _spread(q, cq) if known is None else known.query, rounds)
    key, key_label = lloyd(k, _spread(k, ck) if known is None else known.key, rounds)
    # A round is two products of the tokens with the centroids; dense attention is two with all tokens.
    ctx.spend((rounds + 0.5) * (cq + ck) / (2 * ctx.query.shape[2]) * 2)
    return Clusters(query, key, query_label, key_label)


def _whole(**numbers: object) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{name} must be a number of at least 0, got {value!r}")


def _kmeans_cost(method: object, geometry: object) -> float:
    """Work of a plan with the default clusters: two rounds and the assignment, and a 24th of the first plan's twenty."""
    return float((2.5 + 18 / _PLANS) * (1 / _QUERY_TOKENS + 1 / _KEY_TOKENS))


def _routing_cost(method: object, geometry: object) -> float:
    tokens = max(getattr(geometry, "tokens", 1), 1)
    return float((2.5 + 18 / _PLANS) * 2 / tokens**0.5)


@CONTENT_ORDERS.register("kmeans", paper="arXiv 2505.18875", cost=_kmeans_cost, by_head=True)
def kmeans(ctx: PlanContext, queries: int = 0, keys: int = 0, first: int = 20, later: int = 2) -> ContentOrder:
    """Queries and keys of each head by their clusters, found separately (SVG2's semantic permutation).

    Args:
        ctx: one batch element.
        queries: query clusters, 0 for one in 252 tokens (300 for Wan at 720p).
        keys: key clusters, 0 for one in 76 tokens (1000 for Wan at 720p).
        first: rounds of Lloyd's algorithm for the first plan of a run. The authors' code has 50.
        later: rounds for later plans, which begin with the centroids of the last.

    Raises:
        ValueError: for a negative number.
    """
    _whole(queries=queries, keys=keys, first=first, later=later)
    found = ctx.memory[MEMORY] = _clusters(ctx, queries, keys, first, later)
    return _orders(ctx, found)


@CONTENT_ORDERS.register("routing", paper="arXiv 2003.05997", cost=_routing_cost, by_head=True)
def routing(ctx: PlanContext, clusters: int = 0, first: int = 20, later: int = 2) -> ContentOrder:
    """Queries and keys of each head by shared clusters, on the sphere (Routing Transformer).

    Args:
        ctx: one batch element.
        clusters: clusters, 0 for the square root of the number of tokens, as the paper has it.
        first: rounds for the first plan of a run. The paper learns the centroids over training instead.
        later: rounds for later plans.

    Raises:
        ValueError: for a negative number.
    """
    _whole(clusters=clusters, first=first, later=later)
    part = ctx.geometry.visual_slice
    q, k = (F.normalize(x[0, :, part].float(), dim=-1) for x in (ctx.query, ctx.key))
    tokens = q.shape[1]
    count = min(clusters or max(round(tokens**0.5), 2), tokens)
    known = ctx.memory.get(MEMORY)
    rounds = first if known is None else later
    both = torch.cat((q, k), 1)
    centroids, label = lloyd(both, _spread(both, count) if known is None else known.query, rounds)
    ctx.spend((rounds + 0.5) * 2 * count / ctx.query.shape[2])
    found = ctx.memory[MEMORY] = Clusters(centroids, centroids, label[:, :tokens], label[:, tokens:])
    return _orders(ctx, found)


def _orders(ctx: PlanContext, found: Clusters) -> ContentOrder:
    return ContentOrder(
        head_order(found.query_label.argsort(dim=-1, stable=True), ctx.geometry),
        head_order(found.key_label.argsort(dim=-1, stable=True), ctx.geometry),
    )
