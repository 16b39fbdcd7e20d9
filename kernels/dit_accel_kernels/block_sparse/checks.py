"""What the arguments of :func:`dit_accel_kernels.block_sparse_attention` must look like."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import BlockLists, GatheredKeys, Pooled, TokenOrder, TokenWindows

__all__ = ["check_extras", "check_gathered", "check_lists", "check_tensors"]

_GROUPS = (1, 2, 4, 8, 16, 32, 64)


def check_tensors(q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    """Raise ``ValueError`` unless queries, keys and values fit each other."""
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


def _expect_indices(name: str, indices: Tensor, device: torch.device) -> None:
    if indices.dtype != torch.int32 or indices.ndim != 1 or not indices.numel():
        got = f"{indices.dtype} {list(indices.shape)}"
        raise ValueError(f"{name}.indices must be {torch.int32} [capacity] and not empty, got {got}")
    if indices.device != device:
        raise ValueError(f"{name} must be on {device} like q, got {indices.device}")


def check_lists(q: Tensor, k: Tensor, lists: BlockLists) -> None:
    """Raise ``ValueError`` unless the lists fit the queries."""
    batch, heads, sq, _ = q.shape
    if lists.block_q < 1 or lists.block_k < 1:
        raise ValueError(f"block sizes must be positive, got {lists.block_q} and {lists.block_k}")
    rows = ((batch, 1), (heads, 1), (-(-sq // lists.block_q),))
    _expect("lists.row_start", lists.row_start, torch.int32, *rows)
    _expect("lists.full", lists.full, torch.int32, *((n,) for n in lists.row_start.shape))
    if lists.partial is not None:
        _expect("lists.partial", lists.partial, torch.int32, *((n,) for n in lists.row_start.shape))
    _expect_indices("lists", lists.indices, q.device)


def check_extras(
    q: Tensor,
    k: Tensor,
    lists: BlockLists,
    order: TokenOrder | None,
    pooled: Pooled | None,
    windows: TokenWindows | None,
    key_valid: Tensor | None,
) -> None:
    """Raise ``ValueError`` unless what comes with the lists fits them."""
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


def check_gathered(q: Tensor, lists: BlockLists, gathered: GatheredKeys) -> None:
    """Raise ``ValueError`` unless the gathered keys fit the queries and their blocks."""
    batch, heads, sq, dim = q.shape
    if gathered.group not in _GROUPS:
        raise ValueError(f"gathered.group must be one of {_GROUPS}, got {gathered.group}")
    if gathered.k.ndim != 4 or gathered.k.shape[2] < 1:
        raise ValueError(f"gathered.k must be [B, H, Se, D] with Se >= 1, got shape {tuple(gathered.k.shape)}")
    extra = gathered.k.shape[2]
    for name, x in (("k", gathered.k), ("v", gathered.v)):
        _expect(f"gathered.{name}", x, q.dtype, (batch,), (heads,), (extra,), (dim,))
        if x.stride(-1) != 1 and dim > 1:
            raise ValueError(f"gathered.{name} must be contiguous along D, got {x.stride()}")
        if x.device != q.device:
            raise ValueError(f"gathered.{name} must be on {q.device} like q, got {x.device}")
    _expect("gathered.bias", gathered.bias, torch.float32, (batch, 1), (heads, 1), (extra,))
    rows = ((batch, 1), (heads, 1), (-(-sq // lists.block_q),))
    _expect("gathered.row_start", gathered.row_start, torch.int32, *rows)
    _expect("gathered.count", gathered.count, torch.int32, *((n,) for n in gathered.row_start.shape))
    _expect_indices("gathered", gathered.indices, q.device)
