"""How much softmax mass each block of keys receives: the second pass of a two-pass search (AdaSpa, arXiv 2502.21079)."""

from __future__ import annotations

import torch
from torch import Tensor

from .._common import blocks, check_bhsd, resolve_backend
from ..types import TokenOrder
from .cpu import attention_lse_cpu, block_mass_cpu
from .hopper_launch import block_mass_hopper, why_not_hopper
from .reference import attention_lse_reference, block_mass_reference

__all__ = ["attention_lse", "block_mass"]


def block_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    block_q: int,
    block_k: int,
    scale: float | None = None,
    rows: Tensor | None = None,
    order: TokenOrder | None = None,
    key_valid: Tensor | None = None,
    sample: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax mass of every key block, averaged over the queries of a query block, or over some of them.

    ``mass[b, h, r, j] = mean_i sum_{n in block j} exp(scale * q_i . k_n - lse_i)`` over the queries ``i`` of query block
    ``rows[r]``. With the exact ``lse`` each row sums to 1; with one from an earlier step it says how the mass moved.
    Rows beyond the end and rows whose ``lse`` is ``-inf`` are left out of the mean; a block without any row gets 0.

    Args:
        q: ``[B, H, Sq, D]`` in natural order, any strides, last dimension contiguous.
        k: ``[B, H, Sk, D]`` in block order, any strides, last dimension contiguous.
        lse: float32 ``[B, H, Sq]`` in natural order, natural logarithm.
        block_q: queries in a query block.
        block_k: keys in a key block.
        scale: factor of the logits, ``D ** -0.5`` if ``None``.
        rows: int32 ``[R]``, query blocks to look at, ``None`` for all.
        order: where the queries of a block are; ``None`` means natural order.
        key_valid: bool ``[B, Sk]`` in block order; invalid keys count nothing, whatever they hold.
        sample: look at this many queries of each block only, evenly spaced from its first; a divisor of ``block_q``. The
            time falls nearly as much. ``None`` for all.
        backend: ``"hopper"``, ``"triton"``, ``"cpu"``, ``"reference"`` or ``None`` for the fastest.

    Returns:
        float32 ``[B, H, R, ceil(Sk / block_k)]``.

    Raises:
        ValueError: shapes do not fit, ``sample`` does not divide ``block_q``, or ``backend`` cannot run here.
    """
    check_bhsd("q", q)
    check_bhsd("k", k)
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must agree in B, H and D, got {tuple(q.shape)} and {tuple(k.shape)}")
    if lse.shape != q.shape[:3]:
        raise ValueError(f"lse must be {tuple(q.shape[:3])}, got {tuple(lse.shape)}")
    if block_q < 1 or block_k < 1:
        raise ValueError(f"blocks must hold at least one token, got {block_q=} and {block_k=}")
    each = block_q if sample is None else sample
    if each < 1 or block_q % each:
        raise ValueError(f"sample must divide block_q={block_q}, got {sample}")
    chosen = _resolve(backend, q, k, each, block_k)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    table, head = (None, None) if order is None else (order.table, order.head)
    args = (q, k, lse, each, block_k, scale, rows, table, head, key_valid)
    if chosen == "reference":
        return block_mass_reference(*args, step=block_q // each)
    return _block_mass_op(*args, chosen == "triton", block_q // each, chosen == "hopper")


def _resolve(backend: str | None, q: Tensor, k: Tensor, each: int, block_k: int) -> str:
    """The implementation of :func:`block_mass` to use."""
    if backend in (None, "hopper"):
        reason = why_not_hopper(q, k, each, block_k)
        if reason is None:
            return "hopper"
        if backend is not None:
            raise ValueError(f"backend='hopper' cannot run: {reason}")
    return resolve_backend(backend, q)


def attention_lse(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    key_valid: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Log-sum-exp of the attention logits of each query.

    Args:
        q: ``[B, H, Sq, D]``, any strides, last dimension contiguous.
        k: ``[B, H, Sk, D]``, any strides, last dimension contiguous.
        scale: factor of the logits, ``D ** -0.5`` if ``None``.
        key_valid: bool ``[B, Sk]`` in the order of ``k``.
        backend: ``"triton"``, ``"cpu"``, ``"reference"`` or ``None`` for the fastest.

    Returns:
        float32 ``[B, H, Sq]``, natural logarithm, ``-inf`` for a query that sees no key.

    Raises:
        ValueError: shapes do not fit, or ``backend`` cannot run here.
    """
    check_bhsd("q", q)
    check_bhsd("k", k)
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must agree in B, H and D, got {tuple(q.shape)} and {tuple(k.shape)}")
    chosen = resolve_backend(backend, q)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if chosen == "reference":
        return attention_lse_reference(q, k, scale, key_valid)
    return _attention_lse_op(q, k, scale, key_valid, chosen == "triton")


@torch.library.custom_op("dit_accel_kernels::block_mass", mutates_args=())
def _block_mass_op(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
    rows: Tensor | None,
    table: Tensor | None,
    head: Tensor | None,
    key_valid: Tensor | None,
    use_triton: bool,
    step: int = 1,
    use_hopper: bool = False,
) -> Tensor:
    args = (q, k, lse, block_q, block_k, scale, rows, table, head, key_valid, step)
    if use_hopper:
        return block_mass_hopper(*args)
    if not use_triton:
        return block_mass_cpu(*args)
    from .launch import block_mass_triton

    return block_mass_triton(*args)


@_block_mass_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
    rows: Tensor | None,
    table: Tensor | None,
    head: Tensor | None,
    key_valid: Tensor | None,
    use_triton: bool,
    step: int = 1,
    use_hopper: bool = False,
) -> Tensor:
    count = blocks(q.shape[2], block_q * step) if rows is None else rows.shape[0]
    shape = (q.shape[0], q.shape[1], count, blocks(k.shape[2], block_k))
    return q.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("dit_accel_kernels::attention_lse", mutates_args=())
def _attention_lse_op(q: Tensor, k: Tensor, scale: float, key_valid: Tensor | None, use_triton: bool) -> Tensor:
    if not use_triton:
        return attention_lse_cpu(q, k, scale, key_valid)
    from .launch import attention_lse_triton

    return attention_lse_triton(q, k, scale, key_valid)


@_attention_lse_op.register_fake
def _(q: Tensor, k: Tensor, scale: float, key_valid: Tensor | None, use_triton: bool) -> Tensor:
    return q.new_empty(q.shape[:3], dtype=torch.float32)
