"""Keys sorted by how much they are looked at (Permuted Block-Sparse Attention, arXiv 2510.21270)."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.content._registry import CONTENT_ORDERS, ContentOrder, head_order
from dit_accel.context import PlanContext

__all__ = ["key_popularity"]

_PROBES = 128


def key_popularity(ctx: PlanContext, probes: int) -> Tensor:
    """Mean softmax weight of each visual key over evenly spread probe queries, float32 ``[H, V]``.

    The paper probes with the last 128 queries of a prompt; a video has no such end, so they are spread.
    """
    tokens = ctx.query.shape[2]
    count = min(probes, tokens)
    places = ((torch.arange(count, device=ctx.query.device) + 0.5) * tokens / count).long()
    logits = ctx.query[0, :, places].float() @ ctx.key[0].float().mT * ctx.scale
    if ctx.key_valid is not None:
        logits = logits.masked_fill(~ctx.key_valid[0], -torch.inf)
    ctx.spend(0.5 * count / tokens)
    return logits.softmax(-1).mean(1)[:, ctx.geometry.visual_slice]


def _cost(method: object, geometry: object) -> float:
    return float(0.5 * min(_PROBES / max(getattr(geometry, "tokens", 1), 1), 1.0))


@CONTENT_ORDERS.register("key_sort", paper="arXiv 2510.21270", cost=_cost, by_head=True)
def key_sort(ctx: PlanContext, probes: int = _PROBES) -> ContentOrder:
    """Keys of each head by falling popularity, so that what all queries look at lies in few blocks; queries stay.

    Attention that is not causal does not mind a joint permutation of keys and values, so they are sorted over the whole
    sequence; the paper sorts within segments of 256 for the sake of causality.

    Raises:
        ValueError: if ``probes`` is below 1.
    """
    if isinstance(probes, bool) or not isinstance(probes, int) or probes < 1:
        raise ValueError(f"probes must be a number of queries, at least 1, got {probes!r}")
    popular = torch.nan_to_num(key_popularity(ctx, probes), nan=0.0)
    return ContentOrder(None, head_order(popular.argsort(dim=-1, descending=True, stable=True), ctx.geometry))
