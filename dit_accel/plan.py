"""A plan: what one layer computes on its sparse steps, and how it is carried out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_accel.mask import BlockMask
from dit_accel_kernels import (
    block_sparse_attention,
    block_stats,
    permute_and_pool,
    permute_tokens,
)
from dit_accel_kernels.backends import run_backend
from dit_accel_kernels.types import Pooled, TokenOrder, TokenWindows

__all__ = ["Plan", "execute"]


@dataclass(eq=False)
class Plan:
    """What one layer computes on its sparse steps.

    Attributes:
        mask: which blocks, in block order.
        order: token order per head; ``None`` is natural order.
        order_names: candidates that ``order`` was chosen from.
        windows: token-level windows of partial blocks, or ``None``.
        compensate: whether skipped blocks enter as their mean.
        density: share of the map that is exact, float32 ``[B|1, H|1]`` on the device.
        cost: work of making it, in dense attentions of this layer.
        lse: log-sum-exp ``[B, H, S]`` kept for a later refresh, or ``None``.
        finite: whether the scores were finite, a 0-dim bool on the device.
        recall: softmax mass that the mask keeps by its own scores, ``[B, H]``, or ``None``.
        bias: what :func:`execute` keeps of the pooled remainder between calls.
    """

    mask: BlockMask
    order: TokenOrder | None
    order_names: tuple[str, ...]
    windows: TokenWindows | None
    compensate: bool
    density: Tensor
    cost: float
    lse: Tensor | None = None
    finite: Tensor | None = None
    recall: Tensor | None = None
    bias: Tensor | None = None

    @property
    def pooled_density(self) -> float:
        """Work of the pooled remainder as a share of dense attention: one key per block."""
        return self.mask.key_blocks / self.mask.k_len if self.compensate else 0.0

    def matches(self, query: Tensor) -> bool:
        """Whether the plan fits a query ``[B, H, S, D]``."""
        batch = self.mask.bits.shape[0]
        return (
            query.shape[2] == self.mask.q_len and batch in (1, query.shape[0]) and self.mask.bits.device == query.device
        )


def valid_in_block_order(key_valid: Tensor | None, order: TokenOrder | None) -> Tensor | None:
    """Move a key-valid vector ``[B, S]`` to block order.

    Every candidate order moves the visual tokens among themselves and puts the others in the same
    places, and only those others can be invalid, so one row of the table serves all heads.
    """
    if key_valid is None or order is None:
        return key_valid
    return key_valid[:, order.table[0].long()]


def _pooled_bias(plan: Plan, count: Tensor, key_valid: Tensor | None) -> Tensor:
    """Log of the valid keys of each block, float32 ``[B|1, 1, Kb]``; kept where only the geometry decides it."""
    if key_valid is not None:
        return count.to(torch.float32).log()[:, None]
    if plan.bias is None:
        plan.bias = count.to(torch.float32).log()[:, None]
    return plan.bias


def execute(
    plan: Plan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None,
    key_valid: Tensor | None,
    backend: str | None,
) -> Tensor:
    """Sparse attention by a plan.

    Args:
        plan: made for tensors of these shapes.
        query: ``[B, H, S, D]`` in natural order, any strides.
        key: like ``query``.
        value: like ``query``.
        scale: factor of the logits; ``None`` is ``D ** -0.5``.
        key_valid: bool ``[B, S]`` in natural order, or ``None``.
        backend: a kernel backend that has passed its self-test here, or ``None`` to choose and check.

    Returns:
        ``[B, H, S, D]`` with the strides of ``query``.
    """
    block = plan.mask.block_k
    valid = valid_in_block_order(key_valid, plan.order)
    pooled = None
    if plan.compensate:
        if plan.order is not None:
            moved = permute_and_pool(key, value, plan.order, block=block, key_valid=valid)
            key, value, mean_k, mean_v, count = moved
        else:
            mean_k, _, count = block_stats(key, block=block, key_valid=valid)
            mean_v = block_stats(value, block=block, key_valid=valid).mean
        pooled = Pooled(mean_k, mean_v, _pooled_bias(plan, count, key_valid), plan.mask.bits)
    elif plan.order is not None:
        key, value = permute_tokens(key, plan.order), permute_tokens(value, plan.order)
    options: dict[str, Any] = {
        "order": plan.order,
        "pooled": pooled,
        "windows": plan.windows,
        "key_valid": valid,
        "return_lse": False,
    }
    lists = plan.mask.lists()
    if backend is None or torch.compiler.is_compiling():
        out = block_sparse_attention(query, key, value, lists, scale=scale, backend=backend, **options)
        assert isinstance(out, Tensor)
        return out
    # The caller has chosen and tested the backend, and plans fit by construction: no check, no second operator.
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    return run_backend(backend, query, key, value, lists, scale=factor, **options)[0]
