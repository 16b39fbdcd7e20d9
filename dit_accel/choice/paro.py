"""PAROAttention's metric for the choice of an order (arXiv 2506.16054)."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.choice._registry import CHOICES, sampled_rows
from dit_accel.context import PlanContext
from dit_accel_kernels import permute_tokens
from dit_accel_kernels.types import TokenOrder

__all__ = ["ALPHA", "EPSILON", "SIGMA", "paro_scores"]

#: Weight of the sparse term. The paper gives no value.
ALPHA = 0.5
#: An entry of the map below this counts as empty.
EPSILON = 1e-3
#: A block counts as empty if this share of its entries does.
SIGMA = 0.9


def paro_scores(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    table: Tensor,
    rows: Tensor,
    *,
    block_q: int,
    block_k: int,
    scale: float | None,
    alpha: float = ALPHA,
) -> Tensor:
    """Minus the metric ``M`` of each candidate order and head; larger is better.

    ``M = alpha * (1 - M_sparse) / sum + (1 - alpha) * M_quant / sum``, with ``M_sparse`` the share
    of empty blocks, ``M_quant`` the mean of ``max / mean`` over blocks, and sums over the candidates.
    As printed the paper rewards few empty blocks; ``1 - M_sparse`` is what its text says. Blocks are
    those of sampled query blocks.

    Args:
        query: ``[B, H, S, D]`` in natural order.
        key: like ``query``.
        lse: float32 ``[B, H, S]``.
        table: int32 ``[N, S]`` candidate orders.
        rows: int32 ``[R]`` query blocks to look at.
        block_q: tokens in a query block.
        block_k: tokens in a key block.
        scale: factor of the logits; ``None`` is ``D ** -0.5``.
        alpha: weight of the sparse term.

    Returns:
        float32 ``[N, H]``.
    """
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    heads = query.shape[1]
    head = torch.zeros(heads, dtype=torch.int32, device=query.device)
    sparse, spread = [], []
    for candidate in range(table.shape[0]):
        order = TokenOrder(table[candidate : candidate + 1], head)
        keys = permute_tokens(key, order).float()
        per_row = [
            _block_metrics(query, keys, lse, order.table[0].long(), int(r), block_q, block_k, factor)
            for r in rows.tolist()
        ]
        empty, incoherence = (torch.stack(m).mean(0) for m in zip(*per_row, strict=True))
        sparse.append(1 - empty)
        spread.append(incoherence)
    busy, rough = torch.stack(sparse), torch.stack(spread)
    busy = busy / busy.sum(0, keepdim=True).clamp(min=1e-12)
    rough = rough / rough.sum(0, keepdim=True).clamp(min=1e-12)
    return -(alpha * busy + (1 - alpha) * rough)


def _block_metrics(
    query: Tensor,
    keys: Tensor,
    lse: Tensor,
    index: Tensor,
    row: int,
    block_q: int,
    block_k: int,
    factor: float,
) -> tuple[Tensor, Tensor]:
    """Share of empty blocks and mean incoherence in one block row, ``[H]`` each."""
    tokens = index[row * block_q : (row + 1) * block_q]
    probs = torch.exp(query[:, :, tokens].float() @ keys.mT * factor - lse[:, :, tokens, None])
    whole = probs.shape[-1] // block_k * block_k  # a ragged last block is left out
    blocks = probs[..., :whole].unflatten(-1, (-1, block_k))  # [B, H, bq, Kb, bk]
    empty = (blocks < EPSILON).float().mean((2, 4)) >= SIGMA
    peak = blocks.amax((2, 4)) / blocks.mean((2, 4)).clamp(min=1e-20)
    return empty.float().mean((0, 2)), peak.mean((0, 2))


def _scores(ctx: PlanContext, table: Tensor) -> Tensor:
    """Minus the metric of each candidate and head, float32 ``[N, H]``."""
    if ctx.lse is None:
        raise ValueError("PAROAttention's metric needs the log-sum-exp of a dense step, got None")
    rows = sampled_rows(ctx.q_blocks, ctx.query.device)
    block_q, block_k = ctx.block_q, ctx.block_k
    return paro_scores(ctx.query, ctx.key, ctx.lse, table, rows, block_q=block_q, block_k=block_k, scale=ctx.scale)


@CHOICES.register("paro", paper="arXiv 2506.16054", needs_lse=True, static=True, scores=_scores)
def paro(ctx: PlanContext, table: Tensor) -> Tensor:
    """The candidate with the best of PAROAttention's metric, for plans made offline.

    Raises:
        ValueError: without a log-sum-exp.
    """
    return _scores(ctx, table).argmax(0)
