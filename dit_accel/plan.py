"""A plan: what one layer computes on its sparse steps, and how it is carried out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dit_accel.compensate import Compensation, SparseCall, make_compensation
from dit_accel.context import valid_in_block_order
from dit_accel.head_turns import in_turns, turns_of
from dit_accel.mask import BlockMask
from dit_accel.masked import Folded, folds
from dit_accel.precision import quantized_attention
from dit_accel.replayed import PlanReplays, replays_of
from dit_accel.score import Gather
from dit_accel.share import HeadShare
from dit_accel_kernels import (
    block_sparse_attention,
    block_stats,
    permute_and_pool,
    permute_tokens,
)
from dit_accel_kernels.backends import run_backend
from dit_accel_kernels.quantize import Precision
from dit_accel_kernels.types import Pooled, TokenOrder, TokenWindows

__all__ = ["Plan", "execute", "execute_with_lse"]

_DROP = make_compensation("drop")


@dataclass(eq=False)
class Plan:
    """What one layer computes on its sparse steps.

    Attributes:
        mask: which blocks, in block order.
        order: token order of the queries, per head; ``None`` is natural order.
        key_order: token order of the keys and values.
        order_names: candidates that ``order`` was chosen from.
        windows: token-level windows of partial blocks, or ``None``.
        compensation: what becomes of skipped blocks.
        density: share of the map that is exact, float32 ``[B|1, H|1]`` on the device.
        cost: work of making it, in dense attentions of this layer.
        gather: single or pooled keys that enter besides, or ``None``.
        seen_bits: like ``mask.bits``, blocks that do not enter as their mean, where these are not the exact ones.
        state: what :attr:`compensation` keeps.
        extra_work: work of a sparse call beyond exact blocks, pooled and gathered keys, as a share of dense attention.
        lse: log-sum-exp ``[B, H, S]`` kept for a later refresh, or ``None``.
        finite: whether the scores were finite, a 0-dim bool on the device.
        recall: softmax mass that the mask keeps by its own scores, ``[B, H]``, or ``None``.
        bias: what :func:`execute` keeps of the pooled remainder between calls.
        replays: what :func:`execute` keeps of the launches between calls.
        placement: which heads the plan has where a transformer is spread over processes, else ``None``.
        parts: one plan for each batch element, where orders depend on content; the rest of this plan then only counts.
        precision: number formats of the exact blocks, ``None`` for 16 bit.
        groups: heads, integers on the device, and a plan for each group of them, where their formats differ; the rest of
            this plan then only counts.
    """

    mask: BlockMask
    order: TokenOrder | None
    key_order: TokenOrder | None
    order_names: tuple[str, ...]
    windows: TokenWindows | None
    compensation: Compensation
    density: Tensor
    cost: float
    gather: Gather | None = None
    seen_bits: Tensor | None = None
    state: Any = None
    extra_work: float = 0.0
    lse: Tensor | None = None
    finite: Tensor | None = None
    recall: Tensor | None = None
    bias: Tensor | None = None
    replays: PlanReplays | None = field(default=None, init=False, repr=False)
    placement: HeadShare | None = None
    parts: tuple[Plan, ...] = field(default=())
    precision: Precision | None = None
    groups: tuple[tuple[Tensor, Plan], ...] = field(default=())

    @property
    def leaves(self) -> tuple[Plan, ...]:
        """The plans that are carried out: those of batch elements and groups of heads, or this one."""
        below = self.parts or tuple(plan for _, plan in self.groups)
        return tuple(leaf for plan in below for leaf in plan.leaves) if below else (self,)

    @property
    def compensate(self) -> bool:
        """Whether skipped blocks enter as pooled keys."""
        return self.compensation.pooled

    @property
    def pooled_density(self) -> float:
        """Work of the pooled remainder and of the compensation as a share of dense attention: one key per block."""
        return (self.mask.key_blocks / self.mask.k_len if self.compensate else 0.0) + self.extra_work

    @property
    def gathered_density(self) -> Tensor | float:
        """Work of gathered keys as a share of dense attention."""
        return 0.0 if self.gather is None else self.gather.work

    @property
    def heads(self) -> int:
        """Heads of the mask, 1 if they share one."""
        return self.mask.bits.shape[1]

    def matches(self, query: Tensor) -> bool:
        """Whether the plan fits a query ``[B, H, S, D]``."""
        batch = len(self.parts) if self.parts else self.mask.bits.shape[0]
        return (
            query.shape[2] == self.mask.q_len and batch in (1, query.shape[0]) and self.mask.bits.device == query.device
        )


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
    options: dict[str, Any] = {"scale": scale, "key_valid": key_valid, "backend": backend}
    return execute_with_lse(plan, query, key, value, want_lse=False, **options)[0]


def execute_with_lse(
    plan: Plan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None,
    key_valid: Tensor | None,
    backend: str | None,
    want_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Like :func:`execute`, with the log-sum-exp of what the softmax saw, float32 ``[B, H, S]``, if it is wanted.

    It does not know of what a compensation adds behind the softmax.
    """
    if plan.replays is not None and key_valid is None:
        made = plan.replays.again(plan, (query, key, value), (scale, backend, want_lse))
        if made is not None:
            return made
    options: dict[str, Any] = {"scale": scale, "backend": backend, "want_lse": want_lse}
    if plan.parts:
        return _execute_parts(plan, query, key, value, key_valid=key_valid, **options)
    if plan.groups:
        return _execute_groups(plan, query, key, value, key_valid=key_valid, **options)
    if key_valid is not None and folds(plan):
        folded = Folded.of(plan, query, key, value, key_valid)
        return folded.unfold(*execute_with_lse(folded.plan, *folded.tensors, key_valid=folded.key_valid, **options))
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    turns = turns_of(plan, query, key)
    if turns > 1:

        def part(some: Plan, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
            return _execute_whole(q, k, v, some, key_valid, factor, backend, want_lse)

        return in_turns(part, plan, query, key, value, turns=turns, want_lse=want_lse)
    replays = replays_of(plan, query, backend)
    if replays is None:
        return _execute_whole(query, key, value, plan, key_valid, factor, backend, want_lse)
    if key_valid is None:
        args = plan, None, factor, backend, want_lse
        return replays(_execute_whole, (query, key, value), (scale, backend, want_lse), *args)
    # What follows from the mask is computed each time, since nobody knows whether the mask is still the same.
    moving = (query, key, value, *_of_mask(plan, key_valid))
    return replays(_execute_masked, moving, (scale, backend, want_lse), plan, factor, backend, want_lse)


def _of_mask(plan: Plan, key_valid: Tensor) -> tuple[Tensor, ...]:
    """The mask ``[B, S]`` in block order, in one piece, and where means stand for blocks :func:`_pooled_bias`."""
    valid = valid_in_block_order(key_valid, plan.key_order)
    assert valid is not None
    valid = valid.contiguous()
    if not plan.compensate:
        return (valid,)
    block = plan.mask.block_k
    blocks = F.pad(valid, (0, -valid.shape[1] % block)).unflatten(1, (-1, block))
    return valid, blocks.sum(2, dtype=torch.float32).log()[:, None]


def _execute_masked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor | None]:
    """:func:`_execute_whole` with what follows from a mask, see :func:`_of_mask`."""
    *bias, plan, factor, backend, want_lse = rest
    of_mask = valid, bias[0] if bias else None
    return _execute_whole(query, key, value, plan, None, factor, backend, want_lse, of_mask)


def _execute_whole(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    key_valid: Tensor | None,
    factor: float,
    backend: str | None,
    want_lse: bool,
    of_mask: tuple[Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """A plan for the whole batch and all heads. What it launches is decided by the plan and by layouts alone.

    In place of ``key_valid`` there may be what :func:`_of_mask` has made of it.
    """
    block = plan.mask.block_k
    valid, bias = (valid_in_block_order(key_valid, plan.key_order), None) if of_mask is None else of_mask
    pooled = move_keys = None
    ends = plan.compensation is _DROP or type(plan.compensation).finish is Compensation.finish
    if plan.compensate:
        if plan.key_order is not None:
            moved = permute_and_pool(key, value, plan.key_order, block=block, key_valid=valid)
            key, value, mean_k, mean_v, count = moved
        else:
            mean_k, _, count = block_stats(key, block=block, key_valid=valid)
            mean_v = block_stats(value, block=block, key_valid=valid).mean
        bits = plan.mask.bits if plan.seen_bits is None else plan.seen_bits
        bias = _pooled_bias(plan, count, key_valid) if bias is None else bias
        pooled = Pooled(mean_k, mean_v, bias, bits)
    elif plan.precision is not None and ends:
        move_keys = plan.key_order  # quantising moves them in the same pass
    elif plan.key_order is not None:
        key, value = permute_tokens(key, plan.key_order), permute_tokens(value, plan.key_order)
    out, lse = _run(plan, query, key, value, pooled, valid, factor, backend, want_lse, move_keys)
    if ends:
        return out, lse
    return plan.compensation.finish(SparseCall(plan, query, key, value, valid, factor, pooled), out, lse), lse


def _run(
    plan: Plan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pooled: Pooled | None,
    valid: Tensor | None,
    scale: float,
    backend: str | None,
    want_lse: bool,
    move_keys: TokenOrder | None,
) -> tuple[Tensor, Tensor | None]:
    """One launch: output, and the log-sum-exp where it is wanted or the compensation needs it."""
    needs_lse = want_lse or plan.compensation.needs_lse
    if plan.precision is not None:
        if plan.windows is not None or plan.gather is not None:
            raise ValueError(f"{plan.precision} must be None for a plan with token windows or gathered keys")
        return quantized_attention(
            query,
            key,
            value,
            plan.mask.lists(),
            plan.precision,
            scale=scale,
            order=plan.order,
            move_keys=move_keys,
            pooled=pooled,
            key_valid=valid,
            return_lse=needs_lse,
            backend=backend,
        )
    options: dict[str, Any] = {
        "order": plan.order,
        "pooled": pooled,
        "windows": plan.windows,
        "key_valid": valid,
        "return_lse": needs_lse,
    }
    if plan.gather is not None:
        options["gathered"] = plan.gather.keys(key, value, valid)
    lists = plan.mask.lists()
    if backend is None or torch.compiler.is_compiling():
        made = block_sparse_attention(query, key, value, lists, scale=scale, backend=backend, **options)
        return made if isinstance(made, tuple) else (made, None)
    # The caller has chosen and tested the backend, and plans fit by construction: no check, no second operator.
    out, lse = run_backend(backend, query, key, value, lists, scale=scale, **options)
    return out, lse if needs_lse else None


def _execute_parts(
    plan: Plan, query: Tensor, key: Tensor, value: Tensor, *, key_valid: Tensor | None, want_lse: bool, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """One call for each batch element."""
    out = torch.empty_like(query)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device) if want_lse else None
    for i, part in enumerate(plan.parts):
        one = slice(i, i + 1)
        valid = None if key_valid is None else key_valid[one]
        tensors = query[one], key[one], value[one]
        out[one], found = execute_with_lse(part, *tensors, key_valid=valid, want_lse=want_lse, **options)
        if lse is not None and found is not None:
            lse[one] = found
    return out, lse


def _execute_groups(
    plan: Plan, query: Tensor, key: Tensor, value: Tensor, *, want_lse: bool, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """One call for each group of heads."""
    out = torch.empty_like(query)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device) if want_lse else None
    for heads, group in plan.groups:
        tensors = query.index_select(1, heads), key.index_select(1, heads), value.index_select(1, heads)
        made, found = execute_with_lse(group, *tensors, want_lse=want_lse, **options)
        out.index_copy_(1, heads, made)
        if lse is not None and found is not None:
            lse.index_copy_(1, heads, found)
    return out, lse
