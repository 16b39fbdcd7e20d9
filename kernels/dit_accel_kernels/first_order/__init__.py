"""How queries and keys deviate together from the means of their blocks, to first order, added to sparse attention.

Block-sparse attention with a pooled remainder and the correction at mean queries (:mod:`..query_means`) knows a skipped
block by its mean at each query, and by all its keys at the mean query. What is lacking is joint: to first order, for the
query ``q = q_i + a`` of block ``i``, it is ``a M_i`` with one ``[D, D]`` matrix a block of queries,

    M_i = scale * sum_j exp(scale q_i k_j + log n_j - L_i) C_j,    C_j = mean_n((k_n - k_j) v_n),

over the skipped blocks ``j`` of means ``k_j`` and ``n_j`` keys, ``L_i`` being the mean log-sum-exp of the queries of the
block. That is a product of ``[Qb, Kb]`` with ``[Kb, D * D]``: ``D / (2 * block_q * block_k)`` of dense attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import query_means
from .._common import check_bhsd, eager
from ..query_means.hopper_launch import residual_hopper
from ..query_means.reference import mean_queries_reference, residual_reference
from ..types import Pooled, TokenOrder
from .reference import add_first_order_reference

__all__ = ["add_first_order_"]


def add_first_order_(
    out: Tensor,
    query: Tensor,
    lse: Tensor,
    key: Tensor,
    value: Tensor,
    pooled: Pooled,
    *,
    order: TokenOrder | None = None,
    block_q: int,
    block_k: int,
    scale: float,
    key_valid: Tensor | None = None,
    more: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Add ``r (R_i + a M_i)`` to each output, in place, with ``r = exp(min(0, L_i - L(q) + a c_i))``.

    ``R_i`` is what the mean query lacks, see :func:`dit_accel_kernels.query_means.mean_query_residual`, and ``c_i`` the
    scaled mean key of what the block skips. A query that finds more in the exact blocks than the others has less left to
    correct.

    Args:
        out: ``[B, H, Sq, D]`` in natural order, any strides, last dimension contiguous; changed.
        query: like ``out``.
        lse: float32 ``[B, H, Sq]`` log-sum-exp over exact and pooled keys, in natural order.
        key: ``[B, H, Sk, D]`` in block order.
        value: like ``key``.
        pooled: mean keys and values, the logs of their counts, and the bits of blocks that are exact, ``[B|1, H|1, Qb,
            ceil(Kb / 32)]``.
        order: permutation under which query blocks are formed; ``None`` is natural order.
        block_q: tokens in a query block.
        block_k: tokens in a key block.
        scale: factor of the logits.
        key_valid: bool ``[B, Sk]`` in block order, false for keys that nobody sees and that may hold NaN.
        more: like ``out``, added in the same pass, or ``None``.
        backend: ``"hopper"`` (for what the mean query lacks), ``"triton"``, ``"cpu"``, ``"reference"`` or ``None`` for the
            fastest.

    Returns:
        ``out``. A block with a query that is not finite stays without correction.

    Raises:
        ValueError: shapes do not fit, or ``backend`` cannot run here.
    """
    query_means._check(query, key, value, pooled, block_q, block_k, key_valid)
    for name, x in (("out", out), ("more", more)):
        if x is not None and x.shape != query.shape:
            raise ValueError(f"{name} must be {list(query.shape)}, got {list(x.shape)}")
        if x is not None:
            check_bhsd(name, x)
    if lse.shape != query.shape[:3] or lse.dtype != torch.float32:
        raise ValueError(f"lse must be float32 {list(query.shape[:3])}, got {lse.dtype} {list(lse.shape)}")
    chosen = query_means._resolve(backend, query, key, value, key_valid, block_k)
    table, head = (None, None) if order is None else (order.table, order.head)
    parts = (pooled.k, pooled.v, pooled.bias, pooled.bits)
    op = eager(_op, out)
    op(out, query, lse, key, value, *parts, table, head, key_valid, more, block_q, block_k, scale, chosen)
    return out


@torch.library.custom_op("dit_accel_kernels::add_first_order_", mutates_args=("out",))
def _op(
    out: Tensor,
    query: Tensor,
    lse: Tensor,
    key: Tensor,
    value: Tensor,
    pool_k: Tensor,
    pool_v: Tensor,
    bias: Tensor,
    bits: Tensor,
    table: Tensor | None,
    head: Tensor | None,
    key_valid: Tensor | None,
    more: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
    backend: str,
) -> None:
    pooled = Pooled(pool_k, pool_v, bias, bits)
    given = (out, query, lse, key, value, pooled, table, head, key_valid, more, block_q, block_k, scale)
    if backend in ("cpu", "reference"):
        mean = mean_queries_reference(query, table, head, block_q)
        add_first_order_reference(*given, mean, residual_reference(mean, key, value, pooled, key_valid, block_k, scale))
        return
    from ..query_means.triton import mean_queries_triton, residual_triton
    from .launch import add_first_order_triton

    mean = mean_queries_triton(query, table, head, block_q)
    if backend == "tested":
        reason = query_means.self_test(query.device, query.dtype, query.shape[3], block_k)  # type: ignore[attr-defined]
        backend = "hopper" if reason is None else "triton"
    if backend == "hopper":
        lacks = residual_hopper(mean, key, value, pooled, block_k, scale)
    else:
        lacks = residual_triton(mean, key, value, pooled, key_valid, block_k, scale)
    add_first_order_triton(*given, mean, lacks)


@_op.register_fake
def _(out: Tensor, *args: object) -> None:
    return None
