"""Skipped blocks as their means, corrected at the mean query of each block: our own."""

from __future__ import annotations

from dataclasses import replace
from weakref import WeakKeyDictionary

from torch import Tensor

from dit_accel.compensate._registry import COMPENSATIONS, Compensation, SparseCall
from dit_accel.mask import BlockMask
from dit_accel_kernels.query_means import add_query_means_, mean_query_residual


class _QueryMean(Compensation):
    """``O += dense(q̄_i) - sparse_i(q̄_i)`` for all queries of block ``i``; see :mod:`dit_accel_kernels.query_means`.

    Args:
        queries: a mean is over at most so many queries; blocks of more have several. ``None``: one a block.
    """

    pooled = True
    separable = True

    def __init__(self, queries: int | None) -> None:
        self._queries = queries
        self._bits: WeakKeyDictionary[BlockMask, Tensor] = WeakKeyDictionary()

    def _parts(self, block_q: int) -> int:
        """Mean queries of a block."""
        return 1 if self._queries is None else max(1, block_q // self._queries)

    def finish(self, call: SparseCall, out: Tensor, lse: Tensor | None) -> Tensor:
        assert call.pooled is not None
        mask = call.plan.mask
        parts = self._parts(mask.block_q)
        together = mask.block_q // parts
        pooled = call.pooled
        if parts > 1:  # each part of a block keeps what the block keeps
            bits = self._bits.get(mask)
            if bits is None:
                rows = -(-call.query.shape[2] // together)
                bits = self._bits[mask] = pooled.bits.repeat_interleave(parts, dim=2)[:, :, :rows].contiguous()
            pooled = replace(pooled, bits=bits)
        residual = mean_query_residual(
            call.query,
            call.key,
            call.value,
            pooled,
            order=call.plan.order,
            block_q=together,
            block_k=mask.block_k,
            scale=call.scale,
            key_valid=call.key_valid,
        )
        return add_query_means_(out, residual, order=call.plan.order, block_q=together)

    def known_work(self, block_q: int) -> float:
        return self._parts(block_q) / block_q  # a mean query looks at all keys; one product serves both sums


@COMPENSATIONS.register("query_mean")
def query_mean(queries: int | None = None) -> Compensation:
    """Each skipped block is one key, its mean, and what that lacks at the mean query of a block is added to its outputs.

    The pooled key misses how logits vary within the block of keys. The mean query sees all keys one by one, so it knows
    the part that all queries of its block share; only the joint deviation of queries and keys stays.

    Args:
        queries: a power of two; means are over at most so many queries, so that large blocks have several. ``None``:
            one mean a block.

    Raises:
        ValueError: for anything else.
    """
    if queries is not None and (type(queries) is not int or queries < 1 or queries & (queries - 1)):
        raise ValueError(f"queries must be a power of two, got {queries!r}")
    return _QueryMean(queries)
