"""Each head takes the order in which the best blocks hold most softmax mass."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.choice._registry import CHOICES, fixed_order, kept_blocks, sampled_count, sampled_rows
from dit_accel.context import PlanContext, valid_in_block_order
from dit_accel.geometry import TokenGeometry
from dit_accel_kernels import block_mass, permute_tokens

__all__ = ["order_recall"]


def _cost(method: object, geometry: TokenGeometry, candidates: int) -> float:
    block = getattr(method, "block_q", 64)
    rows = sampled_count(-(-geometry.tokens // block))
    return float(0.5 * candidates * rows * block / geometry.tokens)


def order_recall(ctx: PlanContext, table: Tensor) -> Tensor:
    """Softmax mass that the best blocks of sampled rows would keep under each candidate order.

    Returns:
        float32 ``[N, H]`` recall, averaged over the batch.

    Raises:
        ValueError: without a log-sum-exp.
    """
    if ctx.lse is None:
        raise ValueError("a choice of orders needs the log-sum-exp of a dense step, got None")
    rows = sampled_rows(ctx.q_blocks, ctx.query.device)
    recalls = []
    for candidate in range(table.shape[0]):
        order = fixed_order(table[candidate : candidate + 1], ctx.query.shape[1])
        mass = block_mass(
            ctx.query,
            permute_tokens(ctx.key, order),
            ctx.lse,
            block_q=ctx.block_q,
            block_k=ctx.block_k,
            scale=ctx.scale,
            rows=rows,
            order=order,
            key_valid=valid_in_block_order(ctx.key_valid, order),
        )
        mass = torch.nan_to_num(mass, nan=0.0, posinf=0.0, neginf=0.0)
        kept = mass.topk(kept_blocks(ctx.density, mass.shape[-1]), dim=-1).values
        recalls.append(kept.sum(-1).mean((0, 2)))
    ctx.spend(0.5 * table.shape[0] * rows.shape[0] * ctx.block_q / ctx.query.shape[2])
    return torch.stack(recalls)


@CHOICES.register("recall", needs_lse=True, cost=_cost, scores=order_recall)
def recall(ctx: PlanContext, table: Tensor) -> Tensor:
    """The candidate whose best blocks of sampled rows keep most softmax mass."""
    return order_recall(ctx, table).argmax(0)
