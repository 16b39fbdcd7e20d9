"""Skipped blocks as their means, corrected at mean queries and to first order around them: our own."""

from __future__ import annotations

from torch import Tensor

from dit_accel.compensate._registry import COMPENSATIONS, SparseCall, WorkSizes
from dit_accel.compensate.query_mean import QueryMean
from dit_accel_kernels.first_order import add_first_order_

__all__ = ["FirstOrder"]


class FirstOrder(QueryMean):
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
        return self.finish_with(call, out, lse, None)

    def finish_with(self, call: SparseCall, out: Tensor, lse: Tensor | None, more: Tensor | None) -> Tensor:
        """Correct the output, and add ``more``, like the output, in the same pass."""
        assert lse is not None
        pooled, together = self.by_mean(call)
        return add_first_order_(
            out,
            call.query,
            lse,
            call.key,
            call.value,
            pooled,
            order=call.plan.order,
            block_q=together,
            block_k=call.plan.mask.block_k,
            scale=call.scale,
            key_valid=call.key_valid,
            more=more,
        )

    def known_work(self, sizes: WorkSizes) -> float:
        """Mean queries, weights times covariances, making and applying these."""
        together = sizes.block_q // self.parts(sizes.block_q)
        matrices = 0.5 * sizes.dim / (together * sizes.block_k)  # weights times covariances
        return super().known_work(sizes) + matrices + sizes.dim / max(sizes.tokens, 1)


@COMPENSATIONS.register("first_order")
def first_order(queries: int | None = None) -> QueryMean:
    """What ``query_mean`` does, and how queries and keys deviate together from the means of their blocks, to first order.

    Args:
        queries: as for ``query_mean``.

    Raises:
        ValueError: for anything else.
    """
    return FirstOrder(queries)
