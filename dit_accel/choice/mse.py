"""Online profiling: each head takes the order under which a pattern changes the output least (arXiv 2502.01776)."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.choice._registry import CHOICES
from dit_accel.context import PlanContext
from dit_accel.geometry import TokenGeometry

__all__ = ["SAMPLED_QUERIES", "candidate_errors", "sampled_queries"]

#: Queries whose output is computed under each candidate, as in Sparse VideoGen.
SAMPLED_QUERIES = 64


def _cost(method: object, geometry: TokenGeometry, candidates: int) -> float:
    return float(min(SAMPLED_QUERIES / geometry.tokens, 1.0) * (1 + 0.5 * candidates))


def sampled_queries(geometry: TokenGeometry, device: torch.device) -> Tensor:
    """Evenly spread visual tokens in natural order, int64 ``[min(64, V)]``; each at another place of its block."""
    count = min(SAMPLED_QUERIES, geometry.visual)
    part = torch.arange(count, device=device, dtype=torch.float64)
    shift = (part * 0.6180339887498949) % 1.0
    return geometry.prefix + ((part + shift) * geometry.visual / count).long()


def candidate_errors(ctx: PlanContext, table: Tensor) -> Tensor:
    """Mean squared difference between masked and exact output of sampled queries, float32 ``[N, H]``.

    Args:
        ctx: the plan's context, with values and the levels of the pattern under each candidate.
        table: int32 ``[N, S]`` candidate orders.

    Raises:
        ValueError: the method has no pattern.
    """
    if ctx.candidate_levels is None:
        raise ValueError(f"order_choice 'mse' needs a pattern in the score slot, got {ctx.method.score!r}")
    if ctx.value is None:
        raise ValueError("order_choice 'mse' looks at the values, and the caller of the planner gave none")
    rows = sampled_queries(ctx.geometry, table.device)
    seen = torch.stack([_seen(ctx, table[n], ctx.candidate_levels[0, n], rows) for n in range(len(table))])
    errors = []
    for head in range(ctx.query.shape[1]):  # by head, so that float32 copies stay small
        logits = ctx.query[:, head, rows].float() @ ctx.key[:, head].float().mT * ctx.scale
        if ctx.key_valid is not None:
            logits = logits.masked_fill(~ctx.key_valid[:, None], -torch.inf)
        value = ctx.value[:, head].float()
        exact = logits.softmax(-1) @ value
        masked = (logits.masked_fill(~mask, -torch.inf).softmax(-1) @ value for mask in seen)
        errors.append(torch.stack([(found - exact).square().mean() for found in masked]))
    ctx.spend(len(rows) / ctx.geometry.tokens * (1 + 0.5 * len(table)))
    return torch.stack(errors, 1)


def _seen(ctx: PlanContext, order: Tensor, levels: Tensor, rows: Tensor) -> Tensor:
    """Keys in natural order that sampled queries see, bool ``[R, S]``."""
    place = torch.empty_like(order, dtype=torch.int64)
    place[order.long()] = torch.arange(len(order), device=order.device)
    return levels[place[rows] // ctx.block_q][:, place // ctx.block_k] > 0


@CHOICES.register("mse", paper="arXiv 2502.01776", patterns=True, cost=_cost)
def mse(ctx: PlanContext, table: Tensor) -> Tensor:
    """The candidate under which the pattern changes the output of 64 sampled queries least.

    The paper samples from the first 10,000 tokens only, to bound its dense masks; here from all of them.
    """
    return candidate_errors(ctx, table).argmin(0)
