"""Skipped blocks as their means, corrected at mean queries and to first order around them: our own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dit_accel.compensate._registry import COMPENSATIONS, SparseCall, WorkSizes
from dit_accel.compensate.query_mean import QueryMean
from dit_accel_kernels import permute_tokens, unpermute_tokens
from dit_accel_kernels.lists import unpack_bits
from dit_accel_kernels.types import Pooled, TokenOrder

__all__ = ["corrections"]

_BYTES = 64 << 20  # of the matrices of blocks that are made at once


class _FirstOrder(QueryMean):
    """``O += r (R_i + a M_i)`` for each query ``q = q̄_i + a`` of block ``i``, with ``R_i`` of :class:`QueryMean`.

    With ``b_n = k_n - k̄_j`` a key's deviation from the mean of its block ``j`` and ``scale`` left out, the weight of a
    skipped key is ``exp(q̄ k̄ + a k̄) exp(q̄ b) exp(a b)``. The means have the first factor, ``R_i`` the second as far as all
    queries of the block share it. To first order the last adds ``a C_j`` times the block's weight, with the covariance
    ``C_j = mean_n(b_n v_n)`` of its keys and values. So

        M_i = scale * sum_j exp(q̄_i k̄_j + log n_j - L_i) C_j

    over the skipped blocks, where ``L_i`` is the mean log-sum-exp of the block's queries. It is at least that of the mean
    query (the log-sum-exp is convex), so that the sum errs on the safe side. A query that finds more in the exact blocks
    than the others has less left to correct: ``r = exp(min(0, L_i - L(q) + a kappa_i))`` with the mean key ``kappa_i`` of
    what is skipped.
    """

    needs_lse = True

    def finish(self, call: SparseCall, out: Tensor, lse: Tensor | None) -> Tensor:
        """Correct the output."""
        assert call.pooled is not None
        assert lse is not None
        pooled, together = self.by_mean(call)
        shared = self.residual(call, pooled, together)
        for heads, found in corrections(call, pooled, together, shared, lse):
            out[:, heads] += found
        return out

    def known_work(self, sizes: WorkSizes) -> float:
        """Mean queries, weights times covariances, making and applying these."""
        together = sizes.block_q // self.parts(sizes.block_q)
        matrices = 0.5 * sizes.dim / (together * sizes.block_k)  # weights times covariances
        return super().known_work(sizes) + matrices + sizes.dim / max(sizes.tokens, 1)


def corrections(
    call: SparseCall, pooled: Pooled, together: int, shared: Tensor, lse: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """What is added to the output, some heads at a time, so that their matrices stay small.

    Args:
        call: with queries in natural order, keys and values in block order.
        pooled: means of blocks of keys, and bits by mean query.
        together: queries a mean.
        shared: ``[B, H, ceil(S / together), D]``, what mean queries lack.
        lse: float32 ``[B, H, S]`` log-sum-exp over exact and pooled keys, in natural order.

    Yields:
        Some heads, and ``[B, h, S, D]`` for them in natural order, in the dtype of ``shared``.
    """
    batch, heads, _, dim = call.query.shape
    kind = torch.bfloat16 if call.query.is_cuda and call.query.dtype != torch.float32 else torch.float32
    step = max(1, _BYTES // (2 * batch * pooled.k.shape[2] * dim * dim * kind.itemsize))
    order = call.plan.order
    for first in range(0, heads, step):
        some = slice(first, min(first + step, heads))
        part = None if order is None else TokenOrder(order.table, order.head[some])
        queries = _Queries.of(call.query[:, some], lse[:, some], part, together)
        found = _correction(queries, call, pooled, shared, some, kind)
        yield some, found if part is None else unpermute_tokens(found, part)


class _Queries(NamedTuple):
    """Queries of some heads by mean: ``apart`` ``[B, h, Qb, together, D]`` from their ``mean`` ``[B, h, Qb, D]``.

    ``lse`` and its ``middle`` over the block are float32 ``[B, h, Qb, together]`` and ``[B, h, Qb, 1]``.
    """

    apart: Tensor
    mean: Tensor
    lse: Tensor
    middle: Tensor
    tokens: int

    @classmethod
    def of(cls, query: Tensor, lse: Tensor, order: TokenOrder | None, together: int) -> _Queries:
        """From natural order. A query that is not finite spoils itself alone."""
        if order is not None:
            query, lse = permute_tokens(query, order), permute_tokens(lse[..., None], order)[..., 0]
        tokens = query.shape[2]
        short = -tokens % together
        rows = F.pad(query, (0, 0, 0, short)).unflatten(2, (-1, together))
        sizes = (tokens - torch.arange(rows.shape[2], device=query.device) * together).clamp(max=together)
        mean = (rows.sum(3, dtype=torch.float32) / sizes[:, None]).nan_to_num(0.0, 0.0, 0.0)
        lse = F.pad(lse, (0, short), value=torch.nan).unflatten(2, (-1, together))
        return cls(rows - mean[:, :, :, None], mean, lse, lse.nanmean(-1, keepdim=True), tokens)


def _correction(
    queries: _Queries, call: SparseCall, pooled: Pooled, shared: Tensor, some: slice, kind: torch.dtype
) -> Tensor:
    """``r (R_i + a M_i)`` for the queries of some heads, ``[B, h, S, D]`` in block order."""
    keys, bias, bits = (x if x.shape[1] == 1 else x[:, some] for x in (pooled.k, pooled.bias, pooled.bits))
    logits = (queries.mean @ keys.float().mT).mul_(call.scale).add_(bias[:, :, None])
    logits.masked_fill_(unpack_bits(bits, keys.shape[2]).bool(), -torch.inf)
    covariance = _covariances(call, pooled, some, kind)
    blocks, dim = covariance.shape[2:4]
    weights = (logits - queries.middle).exp_().mul_(call.scale).nan_to_num_(0.0).to(kind)
    short = -blocks % 8  # rows of matrices that tensor cores take begin at 16 bytes
    matrices = F.pad(weights, (0, short)) @ F.pad(covariance.flatten(3), (0, 0, 0, short))
    centre = logits.softmax(-1).nan_to_num_(0.0).mul_(call.scale) @ keys.float()
    moved = (queries.apart @ centre[..., None].to(queries.apart.dtype))[..., 0]
    share = (queries.middle - queries.lse + moved).clamp_(max=0).exp_()[..., None]
    found: Tensor = queries.apart.to(kind) @ matrices.unflatten(3, (dim, dim)) + shared[:, some, :, None]
    return (found * share).to(shared.dtype).flatten(2, 3)[:, :, : queries.tokens]


def _covariances(call: SparseCall, pooled: Pooled, some: slice, kind: torch.dtype) -> Tensor:
    """Covariance of keys and values in each block of keys, ``[B, h, Kb, D, D]``; invalid keys count nothing."""
    keys, values, means, block = call.key[:, some], call.value[:, some], pooled.k[:, some], call.plan.mask.block_k
    short, valid = -keys.shape[2] % block, call.key_valid
    spread = F.pad(keys, (0, 0, 0, short)).unflatten(2, (-1, block)) - means[:, :, :, None]
    values = F.pad(values, (0, 0, 0, short)).unflatten(2, (-1, block))
    if valid is not None:
        hidden = ~F.pad(valid, (0, short)).unflatten(1, (-1, block))[:, None, :, :, None]
        spread, values = spread.masked_fill(hidden, 0), values.masked_fill(hidden, 0)
    counts = pooled.bias.exp().clamp_(min=1)[..., None, None]  # of valid keys
    found: Tensor = spread.to(kind).mT @ values.to(kind)
    return found.div(counts).to(kind)


@COMPENSATIONS.register("first_order")
def first_order(queries: int | None = None) -> QueryMean:
    """What ``query_mean`` does, and how queries and keys deviate together from the means of their blocks, to first order.

    Args:
        queries: as for ``query_mean``.

    Raises:
        ValueError: for anything else.
    """
    return _FirstOrder(queries)
