"""Attention over chosen blocks of keys, exact within them; see :func:`block_sparse_attention`."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from ..backends import choose_backend, require_backend, run_backend
from ..types import BlockLists, Pooled, TokenOrder, TokenWindows

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
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from each block of queries to the blocks of keys in its list, and to nothing else.

    Skipped blocks are never read. A query that sees no key gives output 0 and a log-sum-exp of minus infinity. Forward
    only.

    Args:
        q: ``[B, H, Sq, D]`` in natural order; any strides, last dimension contiguous.
        k: ``[B, H, Sk, D]`` in block order; any strides, last dimension contiguous.
        v: like ``k``.
        lists: the blocks that each query block visits.
        scale: positive factor of the logits, ``D ** -0.5`` by default.
        order: permutation under which query blocks are formed; the output is in natural order all the same.
        pooled: one mean key and value for each block that is not visited.
        windows: token windows within the ``partial`` blocks of ``lists``; without them those blocks are whole.
        key_valid: bool ``[B, Sk]`` in block order, false for padding.
        return_lse: also return the log-sum-exp of the logits, natural logarithm.
        backend: ``"hopper"``, ``"triton"``, ``"cpu"``, ``"reference"``, or ``None`` for the first that passed its
            self-test here.

    Returns:
        The output ``[B, H, Sq, D]`` with the dtype and layout of ``q``; with ``return_lse`` also float32 ``[B, H, Sq]``.

    Raises:
        ValueError: shapes or dtypes do not fit, or ``backend`` is unknown or cannot run here.
        RuntimeError: the requested backend failed its self-test.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    _check_tensors(q, k, v, scale)
    _check_lists(q, k, lists)
    _check_extras(q, k, lists, order, pooled, windows, key_valid)
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
    return_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    order = TokenOrder(table, head) if table is not None and head is not None else None
    pooled, windows = None, None
    if pooled_k is not None and pooled_v is not None and bias is not None and bits is not None:
        pooled = Pooled(pooled_k, pooled_v, bias, bits)
    if q_lo is not None and q_hi is not None and k_code is not None:
        windows = TokenWindows(q_lo, q_hi, k_code)
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
        return_lse=return_lse,
    )
    return out, lse if return_lse else q.new_empty(0, dtype=torch.float32)


@_op.register_fake
def _(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return_lse = args[-2]
    shape = q.shape[:3] if return_lse else (0,)
    return torch.empty_like(q), torch.empty(shape, dtype=torch.float32, device=q.device)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} must be [B, H, S, D], got shape {tuple(x.shape)}")
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(f"{name} must be contiguous along D, got strides {x.stride()}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} must be {q.dtype} on {q.device} like q, got {x.dtype} on {x.device}")
    if not q.dtype.is_floating_point:
        raise ValueError(f"q must be of a floating-point dtype, got {q.dtype}")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    if k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3]:
        raise ValueError(f"q and k must agree in B, H and D, got {tuple(q.shape)} and {tuple(k.shape)}")
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(f"no dimension may be empty, got {tuple(q.shape)} and {tuple(k.shape)}")
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")


def _expect(name: str, x: Tensor, dtype: torch.dtype, *sizes: tuple[int, ...]) -> None:
    """Raise unless ``x`` has ``dtype`` and each dimension one of the allowed ``sizes``."""
    if x.dtype != dtype or x.ndim != len(sizes) or any(n not in ok for n, ok in zip(x.shape, sizes)):
        wanted = ", ".join("|".join(str(n) for n in sorted(set(ok), reverse=True)) for ok in sizes)
        raise ValueError(f"{name} must be {dtype} [{wanted}], got {x.dtype} {list(x.shape)}")


def _check_lists(q: Tensor, k: Tensor, lists: BlockLists) -> None:
    batch, heads, sq, _ = q.shape
    if lists.block_q < 1 or lists.block_k < 1:
        raise ValueError(f"block sizes must be positive, got {lists.block_q} and {lists.block_k}")
    rows = ((batch, 1), (heads, 1), (-(-sq // lists.block_q),))
    _expect("lists.row_start", lists.row_start, torch.int32, *rows)
    _expect("lists.full", lists.full, torch.int32, *((n,) for n in lists.row_start.shape))
    if lists.partial is not None:
        _expect("lists.partial", lists.partial, torch.int32, *((n,) for n in lists.row_start.shape))
    if lists.indices.dtype != torch.int32 or lists.indices.ndim != 1 or not lists.indices.numel():
        got = f"{lists.indices.dtype} {list(lists.indices.shape)}"
        raise ValueError(f"lists.indices must be {torch.int32} [capacity] and not empty, got {got}")
    if lists.indices.device != q.device:
        raise ValueError(f"lists must be on {q.device} like q, got {lists.indices.device}")


def _check_extras(
    q: Tensor,
    k: Tensor,
    lists: BlockLists,
    order: TokenOrder | None,
    pooled: Pooled | None,
    windows: TokenWindows | None,
    key_valid: Tensor | None,
) -> None:
    batch, heads, sq, dim = q.shape
    sk = k.shape[2]
    qb, kb = -(-sq // lists.block_q), -(-sk // lists.block_k)
    i32 = torch.int32
    if order is not None:
        _expect("order.table", order.table, i32, (order.table.shape[0],), (sq,))
        _expect("order.head", order.head, i32, (heads,))
    if pooled is not None:
        for name, x in (("k", pooled.k), ("v", pooled.v)):
            _expect(f"pooled.{name}", x, q.dtype, (batch,), (heads,), (kb,), (dim,))
            if x.stride(-1) != 1 and dim > 1:
                raise ValueError(f"pooled.{name} must be contiguous along D, got {x.stride()}")
        _expect("pooled.bias", pooled.bias, torch.float32, (batch, 1), (heads, 1), (kb,))
        _expect("pooled.bits", pooled.bits, i32, (batch, 1), (heads, 1), (qb,), (-(-kb // 32),))
    if windows is not None:
        if lists.partial is None:
            raise ValueError("windows apply in partial blocks, but lists.partial is None")
        _expect("windows.q_lo", windows.q_lo, i32, (3,), (sq,))
        _expect("windows.q_hi", windows.q_hi, i32, (3,), (sq,))
        _expect("windows.k_code", windows.k_code, i32, (3,), (sk,))
    if key_valid is not None:
        _expect("key_valid", key_valid, torch.bool, (batch,), (sk,))
