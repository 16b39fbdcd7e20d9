"""Skipped blocks as their means, corrected at the mean query of each block: our own."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from dit_accel.compensate._registry import COMPENSATIONS, Compensation, SparseCall, WorkSizes
from dit_accel.mask import BlockMask
from dit_accel_kernels.query_means import add_query_means_, mean_query_residual
from dit_accel_kernels.types import Pooled

if TYPE_CHECKING:
    from dit_accel.plan import Plan


class QueryMean(Compensation):
    """``O += dense(q̄_i) - sparse_i(q̄_i)`` for all queries of block ``i``; see :mod:`dit_accel_kernels.query_means`.

    Args:
        queries: a mean is over at most so many queries, a power of two; blocks of more have several. ``None``: one a
            block.

    Raises:
        ValueError: ``queries`` is something else.
    """

    pooled = True
    separable = True

    def __init__(self, queries: int | None) -> None:
        if queries is not None and (type(queries) is not int or queries < 1 or queries & (queries - 1)):
            raise ValueError(f"queries must be a power of two, got {queries!r}")
        self._queries = queries
        self._bits: Any = WeakIdKeyDictionary()  # tensors by the index lists of masks, gone when these are dropped

    def parts(self, block_q: int) -> int:
        """Mean queries of a block."""
        return 1 if self._queries is None else max(1, block_q // self._queries)

    def _repeated(self, mask: BlockMask, bits: Tensor) -> Tensor:
        """Bits by mean query: each part of a block keeps what the block keeps. Made once for the lists of a mask."""
        lists = mask.lists()
        found: Tensor | None = self._bits.get(lists)
        if found is None:
            parts = self.parts(mask.block_q)
            rows = -(-mask.q_len // (mask.block_q // parts))
            found = self._bits[lists] = bits.repeat_interleave(parts, dim=2)[:, :, :rows].contiguous()
        return found

    def stays(self, plan: Plan) -> tuple[Tensor, ...]:
        """Bits by mean query, where they are not those of the plan."""
        bits = plan.mask.bits if plan.seen_bits is None else plan.seen_bits
        return (self._repeated(plan.mask, bits),) if self.parts(plan.mask.block_q) > 1 else ()

    def by_mean(self, call: SparseCall) -> tuple[Pooled, int]:
        """The pooled remainder with bits by mean query, and the queries of a mean."""
        assert call.pooled is not None
        mask, pooled = call.plan.mask, call.pooled
        parts = self.parts(mask.block_q)
        if parts > 1:
            pooled = replace(pooled, bits=self._repeated(mask, pooled.bits))
        return pooled, mask.block_q // parts

    def residual(self, call: SparseCall, pooled: Pooled, together: int) -> Tensor:
        """``dense(q̄_i) - sparse_i(q̄_i)`` of each mean over ``together`` queries, ``[B, H, S / together, D]``."""
        return mean_query_residual(
            call.query,
            call.key,
            call.value,
            pooled,
            order=call.plan.order,
            block_q=together,
            block_k=call.plan.mask.block_k,
            scale=call.scale,
            key_valid=call.key_valid,
        )

    def finish(self, call: SparseCall, out: Tensor, lse: Tensor | None) -> Tensor:
        """Add to each output what its mean query lacks."""
        pooled, together = self.by_mean(call)
        return add_query_means_(out, self.residual(call, pooled, together), order=call.plan.order, block_q=together)

    def known_work(self, sizes: WorkSizes) -> float:
        """One row for each mean query."""
        return self.parts(sizes.block_q) / sizes.block_q  # a mean query looks at all keys; one product serves both sums


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
    return QueryMean(queries)
