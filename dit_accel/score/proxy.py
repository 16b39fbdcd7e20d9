"""Token scores of a few pooled heads, each head with a budget of its own (ProxyAttn, arXiv 2509.24745)."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel._specs import parse_spec
from dit_accel.context import PlanContext
from dit_accel.score._blocks import largest_of_rows, row_reductions, whole_blocks
from dit_accel.score._registry import SCORES, Scores
from dit_accel.score.mean_pool import mean_pool

__all__ = ["head_groups"]

_GROUP = 4
_EVERY = 4
_MARKED = 0.25


def _cost(method: object, geometry: object) -> float:
    spec = parse_spec(getattr(method, "score", "proxy"))
    given = dict(zip(("group", "every"), spec.args)) | dict(spec.kwargs)
    group, every = given.get("group", _GROUP), given.get("every", _EVERY)
    return 0.5 / (group * every) if isinstance(group, int) and isinstance(every, int) and group * every > 0 else 0.0


@SCORES.register("proxy", paper="arXiv 2509.24745", cost=_cost)
def proxy(ctx: PlanContext, group: int = _GROUP, every: int = _EVERY, overlap: float = 0.5) -> Scores:
    """Rank blocks by a proxy of several heads, and give each head the budget that its own block means suggest.

    Queries and keys are averaged over heads that are alike; of each proxy the largest probability of a block, over every
    ``every``-th of its queries and all keys, ranks the blocks of all its heads. The value at each rank is the head's own:
    its softmax over block means, sorted. So ``top_p`` keeps as many blocks as the head's own estimate asks for, and keeps
    those that the proxy ranks first.

    Heads of a diffusion transformer differ, so only heads that are shown to be alike share a proxy: see
    :func:`head_groups`. A head that is like no proxy keeps its own ranking.

    Args:
        ctx: what to plan from.
        group: heads for each proxy, on average.
        every: of so many queries one is looked at; must divide the query block.
        overlap: least overlap (intersection over union) of a head's marked blocks with those of its proxy's leader.

    Raises:
        ValueError: if a value is out of range.
    """
    if group < 1 or every < 1 or ctx.block_q % every or not 0 <= overlap <= 1:
        raise ValueError(
            f"proxy needs group >= 1, every >= 1 that divides block_q={ctx.block_q}, and overlap from 0 to 1, got "
            f"{group=}, {every=}, {overlap=}"
        )
    estimate = mean_pool(ctx)
    own = estimate.values if isinstance(estimate, Scores) else estimate
    proxies = -(-own.shape[1] // group)
    which, member = head_groups(own, proxies, overlap)
    ranking = _ranking(ctx, which, member, proxies, every)
    ranking = ranking.gather(1, which[..., None, None].expand(own.shape))
    ranking = torch.where(member[..., None, None], ranking, own)
    order = ranking.argsort(dim=-1, descending=True, stable=True)
    sizes = own.sort(dim=-1, descending=True).values
    return Scores(torch.empty_like(own).scatter_(-1, order, sizes))


def head_groups(own: Tensor, proxies: int, overlap: float) -> tuple[Tensor, Tensor]:
    """Group heads by the overlap of their best blocks, on the device.

    The head most like all others leads the first group, then each time the head least like the leaders so far.

    Args:
        own: float32 ``[B, H, Qb, Kb]``, scores of each head.
        proxies: number of groups.
        overlap: least intersection over union of a member's best quarter of blocks with its leader's.

    Returns:
        int64 ``[B, H]``, the group of each head, and bool ``[B, H]``, whether it is like its leader.
    """
    count = max(round(_MARKED * own.shape[-1]), 1)
    marks = torch.zeros_like(own).scatter_(-1, own.topk(count, dim=-1).indices, 1.0).flatten(2)
    shared = marks @ marks.mT
    alike = shared / (2 * count * own.shape[2] - shared)  # [B, H, H]
    leader = alike.sum(-1).argmax(-1, keepdim=True)
    nearest = alike.gather(1, leader[..., None].expand(-1, 1, alike.shape[2]))  # [B, 1, H], then one more a round
    for _ in range(proxies - 1):
        leader = nearest.amax(1).argmin(-1, keepdim=True)
        nearest = torch.cat((nearest, alike.gather(1, leader[..., None].expand(-1, 1, alike.shape[2]))), 1)
    best, which = nearest.max(1)
    return which, best >= overlap


def _ranking(ctx: PlanContext, which: Tensor, member: Tensor, proxies: int, every: int) -> Tensor:
    """Largest probability of each block for each proxy, float32 ``[B, proxies, Qb, Kb]``; 0 for one without heads."""
    heads = which.shape[1]
    number = torch.arange(proxies, device=which.device)[:, None]
    weight = ((which[:, None] == number) & member[:, None]).float()
    weight = weight / weight.sum(-1, keepdim=True).clamp(min=1)  # [B, proxies, H]
    cols, seen = whole_blocks(ctx.keys, ctx.block_k, ctx.valid)
    queries, cols = (torch.einsum("bgh,bhsd->bgsd", weight.to(x.dtype), x) for x in (ctx.queries[:, :, ::every], cols))
    found = []
    size = ctx.block_q // every
    for _, _, top, lse in row_reductions(
        queries, cols.contiguous(), seen, block_q=size, block_k=ctx.block_k, scale=ctx.scale
    ):
        found.append(largest_of_rows((top - lse.logsumexp(-1, keepdim=True)).exp(), size))
    ctx.spend(0.5 * proxies / (heads * every))
    return torch.cat(found, 2)
