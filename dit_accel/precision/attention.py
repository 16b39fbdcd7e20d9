"""One attention call on quantised operands, and whether a device has a kernel for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dit_accel_kernels.quantize import Precision, quantize_qkv
from dit_accel_kernels.quantized import quantized_block_sparse_attention
from dit_accel_kernels.quantized.backends import choose, self_test, why_not
from dit_accel_kernels.types import BlockLists, Pooled, TokenOrder

__all__ = ["quantized_attention", "serving"]


def _named(backend: str | None) -> str | None:
    """The 8-bit backend that a 16-bit one stands for: itself where both have it, else the best one.

    ``"hopper"`` is no promise: its 8-bit kernel serves other cases than the 16-bit one.
    """
    return backend if backend in ("triton", "reference") else None


def serving(precision: Precision, backend: str | None, **where: Any) -> tuple[str, str | None]:
    """Who computes a number format beside a 16-bit backend, and why that is not good enough, or ``None``.

    Args:
        precision: the number formats.
        backend: the 16-bit backend in force, or ``None``.
        **where: ``device``, ``dtype``, ``head_dim``, ``block_q`` and ``block_k``.

    Returns:
        The name of the 8-bit backend, and the reason why it cannot serve. The reference is good enough on a CPU, and where
        it was asked for.
    """
    name = _named(backend)
    if name is not None:
        reason = why_not(name, precision=precision, **where) or self_test(name, precision=precision, **where)
        return name, None if reason is None else f"{name}: {reason}"
    name, reasons = choose(precision=precision, **where)
    if name != "reference" or torch.device(where["device"]).type == "cpu":
        return name, None
    return name, "; ".join(f"{other}: {reason}" for other, reason in reasons.items())


def quantized_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lists: BlockLists,
    precision: Precision,
    *,
    scale: float,
    order: TokenOrder | None,
    move_keys: TokenOrder | None,
    pooled: Pooled | None,
    key_valid: Tensor | None,
    return_lse: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor | None]:
    """Block-sparse attention on quantised operands.

    Args:
        query: ``[B, H, S, D]`` in natural order.
        key: ``[B, H, S, D]`` in block order; in natural order where ``move_keys`` is given.
        value: like ``key``.
        lists: blocks that each query block visits.
        precision: the number formats.
        scale: factor of the logits.
        order: order of the queries.
        move_keys: order of keys and values that are in natural order: quantising then moves them in the same pass.
        pooled: what stands for blocks that are not visited.
        key_valid: bool ``[B, S]`` in block order, or ``None``.
        return_lse: also return the log-sum-exp.
        backend: the 16-bit backend in force, or ``None``; see :func:`serving`.

    Returns:
        The output ``[B, H, S, D]`` in natural order, and the log-sum-exp, float32 ``[B, H, S]``, or ``None``.
    """
    prepared = None
    if move_keys is not None:
        moved: dict[str, Any] = {"order": order, "key_order": move_keys, "keys_ordered": False, "key_valid": key_valid}
        prepared = quantize_qkv(query, key, value, precision, block_k=lists.block_k, **moved)
    made = quantized_block_sparse_attention(
        query,
        key,
        value,
        lists,
        precision=precision,
        scale=scale,
        order=order,
        pooled=pooled,
        key_valid=key_valid,
        return_lse=return_lse,
        backend=_named(backend),
        prepared=prepared,
    )
    return made if isinstance(made, tuple) else (made, None)
