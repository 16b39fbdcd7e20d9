"""Sparse calls a few heads at a time, where putting all keys in order at once would take too much memory.

Each head may order its tokens differently, so keys and values are put in order for a call, which takes as much memory as
they do. For 75,600 tokens of 40 heads that is 1.4 GiB and would be the peak of a step. Heads do not depend on each other: a
few at a time give the same output. A kernel that shares out the work of all heads evenly, as the correction at mean queries
on Hopper does, cuts its sums elsewhere and rounds differently.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dit_accel.compensate import Compensation
from dit_accel.copies import copy_wide_
from dit_accel.mask import BlockMask
from dit_accel_kernels.types import BlockLists, TokenOrder

if TYPE_CHECKING:
    from dit_accel.plan import Plan

__all__ = ["in_turns", "turns_of"]

#: Bytes of keys and values that are put in order at once where all of them are more than twice as many.
_AT_ONCE = 384 << 20

#: Carries out a plan on ``[B, h, S, D]``: output and log-sum-exp, the latter ``None`` where it was not asked for.
Run = Callable[["Plan", Tensor, Tensor, Tensor], tuple[Tensor, "Tensor | None"]]


def turns_of(plan: Plan, query: Tensor, key: Tensor) -> int:
    """In how many turns a call is carried out.

    Args:
        plan: the plan of the call.
        query: ``[B, H, S, D]``.
        key: like ``query``.
    """
    size = 2 * key.numel() * key.element_size()
    if plan.key_order is None or size <= 2 * _AT_ONCE:
        return 1
    kind, heads = type(plan.compensation), query.shape[1]
    whole = kind.prepare is Compensation.prepare and kind.settle is Compensation.settle
    divides = (
        whole and plan.state is None and plan.gather is None and plan.heads in (1, heads) and heads == key.shape[1]
    )
    return min(heads, -(-size // _AT_ONCE)) if divides else 1


def in_turns(
    run: Run, plan: Plan, query: Tensor, key: Tensor, value: Tensor, *, turns: int, want_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """A call by several of some heads each.

    Args:
        run: carries out a part.
        plan: of all heads.
        query: ``[B, H, S, D]``.
        key: like ``query``.
        value: like ``query``.
        turns: how many calls.
        want_lse: whether the log-sum-exp is returned too.
    """
    heads = query.shape[1]
    out = torch.empty_like(query)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device) if want_lse else None
    starts = [turn * heads // turns for turn in range(turns + 1)]
    for some in map(slice, starts[:-1], starts[1:]):
        part = _part(plan, some)
        made, found = run(part, query[:, some], key[:, some], value[:, some])
        plan.bias = part.bias  # all heads share it
        copy_wide_(out[:, some], made)
        del made
        if lse is not None and found is not None:
            lse[:, some] = found
    return out, lse


def _part(plan: Plan, some: slice) -> Plan:
    """The plan of some heads. Its lists are a part of those of all."""
    mask, own = plan.mask, plan.heads > 1

    def cut(x: Tensor | None) -> Tensor | None:
        return x[:, some].contiguous() if x is not None and own else x

    def order(found: TokenOrder | None) -> TokenOrder | None:
        return None if found is None else TokenOrder(found.table, found.head[some])

    lists = mask.lists()
    start, full, bits = cut(lists.row_start), cut(lists.full), cut(mask.bits)
    assert start is not None
    assert full is not None
    assert bits is not None
    narrow = BlockMask(bits, cut(mask.partial_bits), mask.q_len, mask.k_len, mask.block_q, mask.block_k)
    narrow._lists = BlockLists(start, full, cut(lists.partial), lists.indices, lists.block_q, lists.block_k)
    first = order(plan.order)
    second = first if plan.key_order is plan.order else order(plan.key_order)
    return dataclasses.replace(plan, mask=narrow, order=first, key_order=second, seen_bits=cut(plan.seen_bits))
