"""Skipped blocks as their means, corrected at the mean query of each block: our own."""

from __future__ import annotations

from torch import Tensor

from dit_accel.compensate._registry import COMPENSATIONS, Compensation, SparseCall
from dit_accel_kernels.query_means import add_query_means_, mean_query_residual


class _QueryMean(Compensation):
    """``O += dense(q̄_i) - sparse_i(q̄_i)`` for all queries of block ``i``; see :mod:`dit_accel_kernels.query_means`."""

    pooled = True
    separable = True

    def finish(self, call: SparseCall, out: Tensor, lse: Tensor | None) -> Tensor:
        assert call.pooled is not None
        mask = call.plan.mask
        rows = mean_query_residual(
            call.query,
            call.key,
            call.value,
            call.pooled,
            order=call.plan.order,
            block_q=mask.block_q,
            block_k=mask.block_k,
            scale=call.scale,
            key_valid=call.key_valid,
        )
        return add_query_means_(out, rows, order=call.plan.order, block_q=mask.block_q)

    def known_work(self, block_q: int) -> float:
        return 1 / block_q  # a row a block looks at all keys; one product serves both sums


@COMPENSATIONS.register("query_mean")
def query_mean() -> Compensation:
    """Each skipped block is one key, its mean, and what that lacks at the mean query of a block is added to its outputs.

    The pooled key misses how logits vary within the block of keys. The mean query sees all keys one by one, so it knows
    the part that all queries of its block share; only the joint deviation of queries and keys stays.
    """
    return _QueryMean()
