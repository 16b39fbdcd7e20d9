"""Sparse output scaled to its share, skipped blocks added by pooled weights (Rectified SpaAttn, arXiv 2511.19835)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dit_accel.compensate._registry import COMPENSATIONS, Compensation, SparseCall
from dit_accel.context import PlanContext
from dit_accel_kernels import block_stats, unpermute_tokens

__all__ = ["mean_deviation"]


class _State(NamedTuple):
    """What the plan keeps: ``added`` float32 ``[B, H, Qb, Kb]``, pooled weights of approved skipped blocks, else 0."""

    added: Tensor


def mean_deviation(x: Tensor, means: Tensor, block: int, valid: Tensor | None = None) -> Tensor:
    """Mean absolute deviation of each block of tokens from its mean, float32 ``[B, H, blocks, D]``."""
    spread = (x.float() - means.float().repeat_interleave(block, 2)[:, :, : x.shape[2]]).abs()
    seen = torch.ones(1, x.shape[2], dtype=torch.bool, device=x.device) if valid is None else valid
    spread = spread.masked_fill(~seen[:, None, :, None], 0)
    short = -x.shape[2] % block
    count = F.pad(seen.float(), (0, short)).unflatten(1, (-1, block)).sum(-1).clamp(min=1)
    total: Tensor = F.pad(spread, (0, 0, 0, short)).unflatten(2, (-1, block)).sum(3) / count[:, None, :, None]
    return total


class _Rectified(Compensation):
    """``O = R O_sparse + sum_j P_ij V_j`` over skipped blocks ``j`` that are approved, ``P`` the softmax of block means.

    ``R_i`` is one minus the added weights, so that selected and rejected blocks share it. A block is approved if its pooled
    logit is larger than what the spread inside the blocks can do to it:
    ``|q_i . k_j| > dq_i . |k_j| + |q_i| . dk_j`` with the mean absolute deviations ``dq`` and ``dk`` per channel.
    """

    def prepare(self, ctx: PlanContext, levels: Tensor) -> _State:
        mean_q = ctx.query_stats.mean.float()
        mean_k, _, count = ctx.key_stats
        mean_k = mean_k.float()
        dot = mean_q @ mean_k.mT
        dq = mean_deviation(ctx.queries, mean_q, ctx.block_q)
        dk = mean_deviation(ctx.keys, mean_k, ctx.block_k, ctx.valid)
        doubt = dq @ mean_k.abs().mT + mean_q.abs() @ dk.mT
        weights = (dot * ctx.scale + count.float().log()[:, None, None]).softmax(-1)
        return _State(weights.masked_fill((dot.abs() <= doubt) | (levels > 0), 0))

    def finish(self, call: SparseCall, out: Tensor, lse: Tensor | None) -> Tensor:
        added: Tensor = call.plan.state.added
        mask = call.plan.mask
        values = block_stats(call.value, block=mask.block_k, key_valid=call.key_valid).mean.float()
        more = added @ values
        table = torch.cat((more, 1 - added.sum(-1, keepdim=True)), -1)
        table = table.repeat_interleave(mask.block_q, 2)[:, :, : out.shape[2]]
        if call.plan.order is not None:
            table = unpermute_tokens(table.contiguous(), call.plan.order)
        return (out.float() * table[..., -1:] + table[..., :-1]).to(out.dtype)


@COMPENSATIONS.register("rectified", paper="arXiv 2511.19835")
def rectified() -> Compensation:
    """Skipped blocks whose pooled logit can be trusted are added by pooled weights, the sparse part is scaled."""
    return _Rectified()
