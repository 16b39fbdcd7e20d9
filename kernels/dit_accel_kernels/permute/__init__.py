"""Moving tokens between natural and block order, with or without block means, one pass per tensor.

Results are contiguous ``[B, H, S, D]``: a key tile of the sparse kernel is then one unbroken run of memory, whatever the
layout of the model.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._common import blocks, check_bhsd, eager, resolve_backend
from ..types import TokenOrder
from .reference import permute_and_pool_reference, permute_reference, unpermute_reference

__all__ = ["PermutedPool", "invert_order", "permute_and_pool", "permute_tokens", "unpermute_tokens"]


class PermutedPool(NamedTuple):
    """What :func:`permute_and_pool` returns, all in block order.

    Attributes:
        k: ``[B, H, S, D]`` contiguous keys.
        v: ``[B, H, S, D]`` contiguous values.
        mean_k: ``[B, H, Kb, D]`` mean of the valid keys of each block; 0 where there is none.
        mean_v: ``[B, H, Kb, D]`` mean of the valid values of each block; 0 where there is none.
        count: int32 ``[B|1, Kb]`` valid tokens in each block. ``count.log()`` is the bias of ``Pooled``.
    """

    k: Tensor
    v: Tensor
    mean_k: Tensor
    mean_v: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody calls on it


def invert_order(table: Tensor) -> Tensor:
    """Inverse of each permutation of a table.

    Args:
        table: int ``[N, S]``, each row a permutation of ``range(S)``.

    Returns:
        int32 ``[N, S]`` with ``inverse[n, table[n, i]] = i``.
    """
    places = torch.arange(table.shape[1], dtype=torch.int32, device=table.device).expand(table.shape)
    return torch.zeros(table.shape, dtype=torch.int32, device=table.device).scatter_(1, table.long(), places)


def permute_tokens(x: Tensor, order: TokenOrder, *, backend: str | None = None) -> Tensor:
    """Natural to block order: ``out[b, h, i] = x[b, h, table[head[h], i]]``.

    Args:
        x: ``[B, H, S, D]``, any strides, last dimension contiguous.
        order: permutation of each head.
        backend: ``"triton"``, ``"cpu"``, ``"reference"`` or ``None`` for the fastest.

    Returns:
        Contiguous ``[B, H, S, D]``, the same bits in another order.

    Raises:
        ValueError: the order does not fit ``x``, or ``backend`` cannot run here.
    """
    use_triton = _check(x, order, backend)
    if use_triton is None:
        return permute_reference(x, order.table, order.head)
    found: Tensor = eager(_permute_op, x)(x, order.table, order.head, False, use_triton)
    return found


def unpermute_tokens(x: Tensor, order: TokenOrder, *, backend: str | None = None) -> Tensor:
    """Block to natural order, the inverse of :func:`permute_tokens`.

    Args:
        x: ``[B, H, S, D]`` in block order, any strides, last dimension contiguous.
        order: permutation of each head.
        backend: ``"triton"``, ``"cpu"``, ``"reference"`` or ``None`` for the fastest.

    Returns:
        Contiguous ``[B, H, S, D]``, the same bits in another order.

    Raises:
        ValueError: the order does not fit ``x``, or ``backend`` cannot run here.
    """
    use_triton = _check(x, order, backend)
    if use_triton is None:
        return unpermute_reference(x, order.table, order.head)
    found: Tensor = eager(_permute_op, x)(x, order.table, order.head, True, use_triton)
    return found


def permute_and_pool(
    k: Tensor,
    v: Tensor,
    order: TokenOrder,
    *,
    block: int,
    key_valid: Tensor | None = None,
    backend: str | None = None,
) -> PermutedPool:
    """Keys and values in block order together with the mean of each block.

    Args:
        k: ``[B, H, S, D]`` in natural order, any strides, last dimension contiguous.
        v: ``[B, H, S, D]`` in natural order, any strides, last dimension contiguous.
        order: permutation of each head.
        block: tokens in a block; the last one may be ragged.
        key_valid: bool ``[B, S]`` in **block order**, as everywhere; invalid tokens are moved but not averaged.
        backend: ``"triton"``, ``"cpu"``, ``"reference"`` or ``None`` for the fastest.

    Returns:
        The permuted tensors and means; ``count`` has batch size 1 if ``key_valid`` is ``None``.

    Raises:
        ValueError: shapes do not fit, or ``backend`` cannot run here.
    """
    use_triton = _check(k, order, backend)
    check_bhsd("v", v)
    if v.shape != k.shape or v.dtype != k.dtype:
        raise ValueError(f"k and v must agree, got {tuple(k.shape)} {k.dtype} and {tuple(v.shape)} {v.dtype}")
    if block < 1:
        raise ValueError(f"a block must hold at least one token, got {block=}")
    if key_valid is not None and key_valid.shape != (k.shape[0], k.shape[2]):
        raise ValueError(f"key_valid must be {(k.shape[0], k.shape[2])}, got {tuple(key_valid.shape)}")
    if use_triton is None:
        return PermutedPool(*permute_and_pool_reference(k, v, order.table, order.head, block, key_valid))
    return PermutedPool(*eager(_pool_op, k)(k, v, order.table, order.head, block, key_valid, use_triton))


def _check(x: Tensor, order: TokenOrder, backend: str | None) -> bool | None:
    """Whether to use Triton; ``None`` asks for the reference."""
    check_bhsd("x", x)
    if order.table.shape[1] != x.shape[2] or order.head.shape[0] != x.shape[1]:
        raise ValueError(
            f"order must hold {x.shape[2]} tokens and {x.shape[1]} heads, "
            f"got {order.table.shape[1]} and {order.head.shape[0]}"
        )
    chosen = resolve_backend(backend, x)
    return None if chosen == "reference" else chosen == "triton"


@torch.library.custom_op("dit_accel_kernels::permute", mutates_args=())
def _permute_op(x: Tensor, table: Tensor, head: Tensor, inverse: bool, use_triton: bool) -> Tensor:
    if not use_triton:
        return (unpermute_reference if inverse else permute_reference)(x, table, head)
    from .triton import permute_triton

    return permute_triton(x, table, head, inverse)


@_permute_op.register_fake
def _(x: Tensor, table: Tensor, head: Tensor, inverse: bool, use_triton: bool) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("dit_accel_kernels::permute_and_pool", mutates_args=())
def _pool_op(
    k: Tensor,
    v: Tensor,
    table: Tensor,
    head: Tensor,
    block: int,
    key_valid: Tensor | None,
    use_triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if not use_triton:
        return permute_and_pool_reference(k, v, table, head, block, key_valid)
    from .triton import permute_and_pool_triton

    return permute_and_pool_triton(k, v, table, head, block, key_valid)


@_pool_op.register_fake
def _(
    k: Tensor,
    v: Tensor,
    table: Tensor,
    head: Tensor,
    block: int,
    key_valid: Tensor | None,
    use_triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape = (k.shape[0], k.shape[1], blocks(k.shape[2], block), k.shape[3])
    batch = 1 if key_valid is None else k.shape[0]
    count = k.new_empty((batch, shape[2]), dtype=torch.int32)
    return k.new_empty(k.shape), v.new_empty(v.shape), k.new_empty(shape), v.new_empty(shape), count
