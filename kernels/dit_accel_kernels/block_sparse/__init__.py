"""Attention over chosen blocks of keys, exact within them; see :func:`block_sparse_attention`."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from ..backends import choose_backend, require_backend, run_backend
from ..types import BlockLists, GatheredKeys, Pooled, TokenOrder, TokenWindows
from .checks import check_extras, check_gathered, check_lists, check_tensors

__all__ = ["block_sparse_attention"]


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    *,
    scale: float | None = None,
    order: TokenOrder | None = None,
    pooled: Pooled | None = None,
    windows: TokenWindows | None = None,
    key_valid: Tensor | None = None,
    gathered: GatheredKeys | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from each block of queries to the blocks of keys in its list, and to nothing else but what is added to them.

    One online softmax runs over all that a query sees: the blocks of ``lists`` that are exact, the ``partial`` ones as far
    as ``windows`` let it see, the means of the other blocks if ``pooled`` is given, and the groups of ``gathered``. Any of
    these may be empty for any row, so heads with exact blocks only, with gathered keys only and with a pooled remainder
    fit in one call. What is not listed is never read. A query that sees no key gives output 0 and a log-sum-exp of minus
    infinity. Forward only.

    ``Qb = ceil(Sq / block_q)`` and ``Kb = ceil(Sk / block_k)``, the block sizes being those of ``lists``; a last block may
    be ragged. Written ``B|1``, a dimension may have size 1 and is then shared.

    Args:
        q: ``[B, H, Sq, D]`` in natural order; any strides, last dimension contiguous.
        k: ``[B, H, Sk, D]`` in block order; any strides, last dimension contiguous.
        v: like ``k``.
        lists: the blocks that each query block visits; int32 ``[B|1, H|1, Qb]`` and ``[capacity]``.
        scale: positive factor of the logits, ``D ** -0.5`` by default.
        order: permutation under which query blocks are formed; the output is in natural order all the same.
        pooled: one mean key and value for each block that is not visited; ``[B, H, Kb, D]``.
        windows: token windows within the ``partial`` blocks of ``lists``; without them those blocks are whole.
        key_valid: bool ``[B, Sk]`` in block order, false for padding of ``k``; it says nothing about ``gathered``.
        gathered: further keys ``[B, H, Se, D]``, of which each query block sees the groups in its list, with a bias in
            natural logarithm added to their scaled logits: single columns, or the levels of a pyramid
            (:func:`dit_accel_kernels.pyramid`).
        return_lse: also return the log-sum-exp of the biased logits of all that was seen, natural logarithm.
        backend: ``"hopper"``, ``"triton"``, ``"cpu"``, ``"reference"``, or ``None`` for the first that passed its
            self-test here. What the Hopper kernel does not serve in a call
            (:func:`.hopper_launch.reroute_reason`), the Triton kernel computes.

    Returns:
        The output ``[B, H, Sq, D]`` with the dtype and layout of ``q``; with ``return_lse`` also float32 ``[B, H, Sq]``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, ``scale`` is not positive, ``windows`` come without ``partial``,
            or ``backend`` is unknown or cannot run here.
        RuntimeError: the requested backend failed its self-test.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    check_tensors(q, k, v, scale)
    check_lists(q, k, lists)
    check_extras(q, k, lists, order, pooled, windows, key_valid)
    if gathered is not None:
        check_gathered(q, lists, gathered)
    out, lse = cast(
        "tuple[Tensor, Tensor]",
        _op(
            q,
            k,
            v,
            lists.row_start,
            lists.full,
            lists.partial,
            lists.indices,
            lists.block_q,
            lists.block_k,
            scale,
            *((None, None) if order is None else (order.table, order.head)),
            *((None,) * 4 if pooled is None else (pooled.k, pooled.v, pooled.bias, pooled.bits)),
            *((None,) * 3 if windows is None else (windows.q_lo, windows.q_hi, windows.k_code)),
            key_valid,
            *_gathered_args(gathered),
            return_lse,
            backend or "",
        ),
    )
    return (out, lse) if return_lse else out


@torch.library.custom_op("dit_accel_kernels::block_sparse_attention", mutates_args=())
def _op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_start: Tensor,
    full: Tensor,
    partial: Tensor | None,
    indices: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
    table: Tensor | None,
    head: Tensor | None,
    pooled_k: Tensor | None,
    pooled_v: Tensor | None,
    bias: Tensor | None,
    bits: Tensor | None,
    q_lo: Tensor | None,
    q_hi: Tensor | None,
    k_code: Tensor | None,
    key_valid: Tensor | None,
    more_k: Tensor | None,
    more_v: Tensor | None,
    more_bias: Tensor | None,
    more_start: Tensor | None,
    more_count: Tensor | None,
    more_indices: Tensor | None,
    group: int,
    return_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    order = TokenOrder(table, head) if table is not None and head is not None else None
    pooled, windows, gathered = None, None, None
    if pooled_k is not None and pooled_v is not None and bias is not None and bits is not None:
        pooled = Pooled(pooled_k, pooled_v, bias, bits)
    if q_lo is not None and q_hi is not None and k_code is not None:
        windows = TokenWindows(q_lo, q_hi, k_code)
    more = (more_k, more_v, more_bias, more_start, more_count, more_indices)
    if group:
        gathered = GatheredKeys(*cast("tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]", more), group)
    where: dict[str, Any] = {
        "device": q.device,
        "dtype": q.dtype,
        "head_dim": q.shape[-1],
        "block_q": block_q,
        "block_k": block_k,
    }
    if backend:
        require_backend(backend, **where)
    else:
        backend = choose_backend(**where)[0]
    out, lse = run_backend(
        backend,
        q,
        k,
        v,
        BlockLists(row_start, full, partial, indices, block_q, block_k),
        scale=scale,
        order=order,
        pooled=pooled,
        windows=windows,
        key_valid=key_valid,
        gathered=gathered,
        return_lse=return_lse,
    )
    return out, lse if return_lse else q.new_empty(0, dtype=torch.float32)


@_op.register_fake
def _(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return_lse = args[-2]
    shape = q.shape[:3] if return_lse else (0,)
    return torch.empty_like(q), torch.empty(shape, dtype=torch.float32, device=q.device)


def _gathered_args(gathered: GatheredKeys | None) -> tuple[Any, ...]:
    """The fields of ``gathered`` in order; a group of 0 says that there is none."""
    if gathered is None:
        return (None,) * 6 + (0,)
    g = gathered
    return g.k, g.v, g.bias, g.row_start, g.count, g.indices, g.group
