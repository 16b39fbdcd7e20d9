"""The skipped part of the map through a few agent tokens (Agent Attention, arXiv 2312.08874)."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.compensate._registry import COMPENSATIONS, Compensation, SparseCall
from dit_accel.context import PlanContext
from dit_accel_kernels import dense_attention, unpermute_tokens

__all__ = ["agent_attention"]


def agent_attention(
    query: Tensor, key: Tensor, value: Tensor, agents: int, scale: float, valid: Tensor | None
) -> Tensor:
    """``softmax(Q A^T) softmax(A K^T) V`` with agents ``A`` that are means of runs of queries, ``[B, H, S, D]``.

    Args:
        query: ``[B, H, S, D]``.
        key: ``[B, H, S, D]``.
        value: like ``key``.
        agents: number of agents, at most ``S``.
        scale: factor of the logits of both maps.
        valid: bool ``[B, S]`` for the keys, or ``None``.
    """
    size = -(-query.shape[2] // min(agents, query.shape[2]))
    means = torch.stack([part.float().mean(2) for part in query.split(size, 2)], 2).to(query.dtype)
    broadcast = dense_attention(means, key, value, scale=scale, key_valid=valid)[0]
    return dense_attention(query, means, broadcast, scale=scale, key_valid=None)[0]


class _Agent(Compensation):
    """``O = (1 - r) O_sparse + r O_agent``, ``r`` the pooled mass of the skipped blocks of each query block.

    The paper replaces whole attention by the agent term and ``k V``, with ``k`` tuned for one network. Where blocks are
    skipped only their share is missing, so the term stands for that share and ``k V`` is left out.
    """

    def __init__(self, agents: int) -> None:
        self.agents = agents

    def prepare(self, ctx: PlanContext, levels: Tensor) -> Tensor:
        mean_k, _, count = ctx.key_stats
        logits = torch.einsum("bhqd,bhkd->bhqk", ctx.query_stats.mean.float() * ctx.scale, mean_k.float())
        mass = (logits + count.float().log()[:, None, None]).softmax(-1)
        return mass.masked_fill(levels > 0, 0).sum(-1)  # [B, H, Qb]

    def finish(self, call: SparseCall, out: Tensor, lse: Tensor | None) -> Tensor:
        missing: Tensor = call.plan.state
        share = missing.repeat_interleave(call.plan.mask.block_q, 2)[:, :, : out.shape[2], None]
        if call.plan.order is not None:
            share = unpermute_tokens(share.contiguous(), call.plan.order)
        low_rank = agent_attention(call.query, call.key, call.value, self.agents, call.scale, call.key_valid)
        return torch.lerp(out.float(), low_rank.float(), share).to(out.dtype)

    def work(self, ctx: PlanContext) -> float:
        tokens = ctx.query.shape[2]
        return 2 * min(self.agents, tokens) / tokens


@COMPENSATIONS.register("agent", paper="arXiv 2312.08874")
def agent(agents: int = 64) -> Compensation:
    """The skipped share of each query block through ``agents`` mean queries.

    Raises:
        ValueError: if ``agents`` is below 1.
    """
    if isinstance(agents, bool) or not isinstance(agents, int) or agents < 1:
        raise ValueError(f"agents must be a number of tokens, at least 1, got {agents!r}")
    return _Agent(agents)
