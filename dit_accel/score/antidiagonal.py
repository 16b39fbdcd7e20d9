"""Sums along antidiagonals of the map (XAttention, arXiv 2503.16428)."""

from __future__ import annotations

from dit_accel.context import PlanContext
from dit_accel.score._blocks import unless_finite
from dit_accel.score._registry import SCORES, Scores
from dit_accel_kernels import antidiagonal_scores


def _cost(method: object, geometry: object) -> float:
    stride = SCORES.argument(getattr(method, "score", "antidiagonal"), 1, "stride")
    return 0.5 / stride if isinstance(stride, int) and stride > 0 else 0.0


@SCORES.register("antidiagonal", paper="arXiv 2503.16428", cost=_cost)
def antidiagonal(ctx: PlanContext, stride: int = 8) -> Scores:
    """Softmax over the antidiagonal sums of cells of ``stride`` queries and keys, added up by blocks.

    ``A[i, j] = scale / n * sum_t q[i n + n - 1 - t] . k[j n + t]`` with ``n = stride``; the score of a block is the softmax
    of ``A`` over ``j``, summed over its cells.

    Raises:
        ValueError: if a block is no multiple of ``stride``.
    """
    values = antidiagonal_scores(
        ctx.query,
        ctx.keys,
        block_q=ctx.block_q,
        block_k=ctx.block_k,
        stride=stride,
        scale=ctx.scale,
        order=ctx.order,
        key_valid=ctx.valid,
    )
    ctx.spend(0.5 / stride)
    return Scores(values + unless_finite(ctx), is_mass=True)
