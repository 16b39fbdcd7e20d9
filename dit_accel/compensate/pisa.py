"""Zeroth order by block and one first-order term for all (PISA, arXiv 2602.01077)."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.compensate._registry import COMPENSATIONS, Compensation, SparseCall
from dit_accel.context import PlanContext
from dit_accel_kernels import permute_tokens, unpermute_tokens
from dit_accel_kernels.lists import unpack_bits

__all__ = ["first_order", "pooled_share"]

_CHUNK = 1 << 24


class _Pisa(Compensation):
    """Block means in the softmax, then ``scale * (q . H) * share / S`` with ``H = sum_j (K_j - mean_j)^T V_j``.

    To first order a skipped block ``j`` gives ``exp(s_j) (sum_n v_n + scale * q . H_j)`` with ``s_j = scale * q . mean_j``.
    The paper keeps one ``H`` for all blocks and the mean weight of a skipped token for ``exp(s_j)``: the skipped share of
    the row's mass over the number of tokens. ``H`` runs over all blocks, exact ones included, since it is the same for
    every row.
    """

    pooled = True
    needs_lse = True

    def finish(self, call: SparseCall, out: Tensor, lse: Tensor | None) -> Tensor:
        assert lse is not None
        share = pooled_share(call, lse)
        moment = first_order(call)
        term = (call.query.float() @ moment) * (call.scale / call.key.shape[2]) * share[..., None]
        return (out.float() + term).to(out.dtype)

    def work(self, ctx: PlanContext) -> float:
        return 0.5 / ctx.block_k + ctx.query.shape[-1] / ctx.query.shape[2]


def first_order(call: SparseCall) -> Tensor:
    """``sum_j (K_j - mean_j)^T V_j`` over blocks, float32 ``[B, H, D, D]``; invalid keys count nothing."""
    assert call.pooled is not None
    block = call.plan.mask.block_k
    means = call.pooled.k.repeat_interleave(block, 2)[:, :, : call.key.shape[2]]
    spread, value = call.key.float() - means.float(), call.value.float()
    if call.key_valid is not None:
        hidden = ~call.key_valid[:, None, :, None]
        spread, value = spread.masked_fill(hidden, 0), value.masked_fill(hidden, 0)
    return spread.mT @ value


def pooled_share(call: SparseCall, lse: Tensor) -> Tensor:
    """Share of each query's softmax mass that pooled keys hold, float32 ``[B, H, S]`` in natural order.

    Args:
        call: with its pooled remainder.
        lse: float32 ``[B, H, S]`` log-sum-exp over exact and pooled keys, in natural order.
    """
    assert call.pooled is not None
    plan, block = call.plan, call.plan.mask.block_q
    queries = call.query if plan.order is None else permute_tokens(call.query, plan.order)
    batch, heads, tokens, _ = queries.shape
    exact = unpack_bits(call.pooled.bits, call.pooled.k.shape[2]) > 0
    means = call.pooled.k.float()
    rows = max(_CHUNK // max(batch * heads * means.shape[2] * block, 1), 1) * block
    parts = []
    for first in range(0, tokens, rows):
        logits = queries[:, :, first : first + rows].float() @ means.mT * call.scale + call.pooled.bias[:, :, None]
        blocks = exact[:, :, first // block : -(-min(first + rows, tokens) // block)]
        hidden = blocks.repeat_interleave(block, 2)[:, :, : logits.shape[2]]
        parts.append(logits.masked_fill(hidden, -torch.inf).logsumexp(-1))
    pooled = torch.cat(parts, 2)
    if plan.order is not None:
        pooled = unpermute_tokens(pooled[..., None], plan.order)[..., 0]
    return (pooled - lse).exp().nan_to_num(0.0)


@COMPENSATIONS.register("pisa", paper="arXiv 2602.01077")
def pisa() -> Compensation:
    """Skipped blocks as their mean, plus one first-order term of the keys' spread that all blocks share."""
    return _Pisa()
