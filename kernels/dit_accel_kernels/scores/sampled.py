"""Exact attention among a few queries and keys of each block (ASA, arXiv 2508.10774; PSA, arXiv 2512.04025)."""

from __future__ import annotations

import torch
from torch import Tensor

from .._common import blocks, resolve_backend
from ..types import TokenOrder
from .prepare import check_scores, query_tokens, take
from .reduce import CHUNK_ELEMENTS, block_logits
from .reference import sampled_reference

__all__ = ["sample_blocks", "sampled_scores"]


def sampled_scores(
    q: Tensor,
    k: Tensor,
    q_index: Tensor,
    k_index: Tensor,
    *,
    reduce: str = "max",
    scale: float | None = None,
    order: TokenOrder | None = None,
    key_valid: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention probabilities of sampled queries over sampled keys, reduced to pairs of blocks.

    Each sampled query has a softmax over all sampled keys of its head. ``"max"`` takes the largest probability of a pair
    of blocks (ASA, arXiv 2508.10774; PSA, arXiv 2512.04025), which keeps blocks with a single heavy query; ``"mean"`` sums
    over the keys of a block and averages over its queries, so that each row sums to 1 as in
    :func:`dit_accel_kernels.block_mass`.

    The map of samples is not stored: on the GPU a Triton kernel reduces its tiles at once, elsewhere it comes in chunks.
    Beside the sampled keys the working memory is at most five tensors of 64 MiB, or what one query block of each head
    needs.

    Args:
        q: ``[B, H, Sq, D]`` in natural order, any strides, last dimension contiguous.
        k: ``[B, H, Sk, D]`` in block order, any strides, last dimension contiguous.
        q_index: int ``[H|1, Qb, n]``, positions **in block order** of the sampled queries of each query block;
            :func:`sample_blocks` makes them. Negative entries and those from ``Sq`` on count nothing.
        k_index: int ``[H|1, Kb, m]``, likewise for the key blocks.
        reduce: ``"max"`` or ``"mean"``.
        scale: factor of the logits, ``D ** -0.5`` if ``None``.
        order: where the queries of a block are; ``None`` means natural order.
        key_valid: bool ``[B, Sk]`` in block order; invalid keys count nothing, whatever they hold.
        backend: ``"triton"``, ``"cpu"``, ``"reference"`` or ``None`` for the fastest.

    Returns:
        float32 ``[B, H, Qb, Kb]``, probabilities; 0 where a block has no sample that counts.

    Raises:
        ValueError: shapes do not fit, ``reduce`` is unknown, or ``backend`` cannot run here.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    check_scores(q, k, 1, 1, scale, order, key_valid)
    if reduce not in ("max", "mean"):
        raise ValueError(f"reduce must be 'max' or 'mean', got {reduce!r}")
    for name, index in (("q_index", q_index), ("k_index", k_index)):
        if index.ndim != 3 or index.is_floating_point() or index.shape[0] not in (1, q.shape[1]) or 0 in index.shape:
            got = f"{index.dtype} {tuple(index.shape)}"
            raise ValueError(f"{name} must be an integer [{q.shape[1]}|1, blocks, samples], got {got}")
    chosen = resolve_backend(backend, q)
    if chosen == "reference":
        return sampled_reference(q, k, q_index, k_index, reduce, scale, order, key_valid)
    batch, heads, tokens, dim = q.shape
    (qb, each), (kb, per_block) = q_index.shape[1:], k_index.shape[1:]
    cols, seen = _sampled_keys(k, k_index, key_valid)
    step = max(1, CHUNK_ELEMENTS // (batch * heads * each * max(dim, kb if chosen == "triton" else kb * per_block)))
    out = q.new_empty((batch, heads, qb, kb), dtype=torch.float32)
    for first in range(0, qb, step):
        position = q_index[:, first : first + step].flatten(1).long()[None]
        counts = (position >= 0) & (position < tokens)
        token = query_tokens(position.clamp(0, tokens - 1), order, heads)
        rows = take(q, token, counts)
        top, lse = block_logits(rows, cols, per_block, scale, seen, chosen)
        total = lse.logsumexp(-1, keepdim=True)
        share = ((top if reduce == "max" else lse) - total).exp_().nan_to_num_(0.0)
        share = share.masked_fill_(~counts[..., None], 0.0).unflatten(2, (-1, each))
        if reduce == "max":
            out[:, :, first : first + step] = share.amax(3)
        else:
            count = counts.unflatten(2, (-1, each)).sum(3).clamp(min=1)
            out[:, :, first : first + step] = share.sum(3) / count[..., None]
    return out


def _sampled_keys(k: Tensor, index: Tensor, key_valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """The sampled keys ``[B, H, Kb * m, D]`` and which of them count, bool ``[B|1, H|1, Kb * m]``."""
    tokens = k.shape[2]
    position = index.flatten(1).long()[None]
    seen = (position >= 0) & (position < tokens)
    position = position.clamp(0, tokens - 1)
    if key_valid is not None:
        wide = position.expand(key_valid.shape[0], -1, -1)
        seen = seen & key_valid[:, None].expand(-1, wide.shape[1], -1).gather(2, wide)
    return take(k, position, seen), seen


def sample_blocks(
    tokens: int,
    block: int,
    samples: int,
    *,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Positions of samples of each block, for :func:`sampled_scores`.

    Args:
        tokens: length of the sequence.
        block: tokens in a block; the last one may be ragged.
        samples: positions to take from each block, at most ``block``; PSA takes a quarter.
        device: where the result is.
        generator: draws the samples without replacement, on its own device; without one they are evenly spaced.

    Returns:
        int32 ``[1, ceil(tokens / block), samples]``, sorted, different positions; -1 stands for those that a ragged last
        block has not.

    Raises:
        ValueError: a size is not positive or ``samples`` exceeds ``block``.
    """
    if tokens < 1 or block < 1 or not 1 <= samples <= block:
        raise ValueError(
            f"tokens and block must be positive and samples in 1 to block, got {tokens=}, {block=}, {samples=}"
        )
    count = blocks(tokens, block)
    start = torch.arange(count)[:, None] * block
    length = (tokens - start).clamp(max=block)
    if generator is None:
        taken = length.clamp(max=samples)
        place = torch.arange(samples)
        within = torch.where(place < taken, place * length // taken, block)
    else:
        rank = torch.rand(count, block, generator=generator, device=generator.device).cpu()
        rank = rank.masked_fill(torch.arange(block) >= length, 2.0)
        within = rank.argsort(1)[:, :samples]
        within = within.masked_fill(within >= length, block).sort(1).values
    return torch.where(within < block, start + within, -1).to(torch.int32)[None].to(device)
