"""Key masks that hide visual tokens: where heads order their tokens differently, each needs the mask in its own order.

Models mask the padding of their text, which every order leaves in place. Control methods mask visual keys: Attentive Eraser
(arXiv 2412.12974) hides the object that is to vanish. Whether a mask does so is on the device, and nothing here waits for
it: a plan whose heads have orders of their own is carried out with heads as batch elements, each with its own mask; where
that cannot be, the heads of masked calls share one order.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dit_accel.compensate import Compensation, make_compensation
from dit_accel.geometry import TokenGeometry
from dit_accel.mask import BlockMask
from dit_accel.score import SCORES
from dit_accel_kernels import permute_tokens, unpermute_tokens
from dit_accel_kernels.types import BlockLists, TokenOrder

if TYPE_CHECKING:
    from dit_accel.method import Method
    from dit_accel.plan import Plan

__all__ = ["Folded", "corrects_output", "fill_blind", "folds", "keeps_head_orders", "one_for_all"]


def corrects_output(compensation: Compensation) -> bool:
    """Whether a compensation changes the output behind the softmax to what can neither be joined nor folded."""
    return type(compensation).finish is not Compensation.finish and not compensation.separable


def keeps_head_orders(method: Method) -> bool:
    """Whether masked calls of a method can be carried out with an order for each head."""
    gathers = not method.is_geometric and bool(SCORES.trait(method.score, "gathers", False))
    return not (gathers or method.has_levels or corrects_output(make_compensation(method.compensate)))


def folds(plan: Plan) -> bool:
    """Whether a masked call of this plan has to be, and can be, carried out with heads as batch elements."""
    orders = [order for order in (plan.order, plan.key_order) if order is not None]
    several = any(order.table.shape[0] > 1 for order in orders)
    return several and plan.gather is None and plan.windows is None and not corrects_output(plan.compensation)


def one_for_all(choice: Tensor, method: Method, geometry: TokenGeometry, key_valid: Tensor, candidates: int) -> Tensor:
    """The candidate that most heads chose, for all of them, where a mask hides visual tokens; else each head's own.

    Block scores take one mask for all heads. Methods that cannot keep an order for each head get one for all in any masked
    call.

    Args:
        choice: integers ``[H]``.
        method: the method.
        geometry: where the tokens sit.
        key_valid: bool ``[B, S]`` in natural order.
        candidates: number of candidate orders.
    """
    votes = (choice[:, None] == torch.arange(candidates, device=choice.device)).sum(0)
    shared = votes.argmax().to(choice.dtype).expand_as(choice)
    if not keeps_head_orders(method):
        return shared
    return torch.where(key_valid[:, geometry.visual_slice].all(), choice, shared)


def fill_blind(out: Tensor, lse: Tensor, value: Tensor, key_valid: Tensor) -> Tensor:
    """Give queries that see no key, since all of theirs are masked, the mean of the valid values.

    Args:
        out: ``[B, H, S, D]``.
        lse: float32 ``[B, H, S]``, minus infinity where a query saw no key.
        value: ``[B, H, S, D]``.
        key_valid: bool ``[B, S]``.
    """
    weight = key_valid[:, None, :, None]
    total = value.masked_fill(~weight, 0).sum(2, keepdim=True, dtype=torch.float32)
    mean = total / weight.sum(2, keepdim=True).clamp(min=1)
    return torch.where((lse == -torch.inf)[..., None], mean.to(out.dtype), out)


@dataclass(frozen=True, eq=False)
class Folded:
    """One sparse call with ``B * H`` batch elements of one head each.

    Attributes:
        plan: the plan of the folded tensors, without orders.
        tensors: query, key and value ``[B * H, 1, S, D]`` in block order.
        key_valid: bool ``[B * H, S]`` in block order.
        order: order of the queries, to undo in the end.
        shape: ``(B, H)``.
    """

    plan: Plan
    tensors: tuple[Tensor, Tensor, Tensor]
    key_valid: Tensor
    order: TokenOrder | None
    shape: tuple[int, int]

    @classmethod
    def of(cls, plan: Plan, query: Tensor, key: Tensor, value: Tensor, key_valid: Tensor) -> Folded:
        """Fold a call; tensors and mask in natural order."""
        batch, heads = query.shape[:2]
        moved = (
            _moved(query, plan.order).flatten(0, 1)[:, None],
            _moved(key, plan.key_order).flatten(0, 1)[:, None],
            _moved(value, plan.key_order).flatten(0, 1)[:, None],
        )
        valid = key_valid[:, None].expand(-1, heads, -1)
        if plan.key_order is not None:
            table = plan.key_order.table.index_select(0, plan.key_order.head).long()
            valid = valid.gather(2, table.expand(batch, -1, -1))
        seen = None if plan.seen_bits is None else _fold(plan.seen_bits, batch, heads)
        folded = dataclasses.replace(
            plan, mask=_folded_mask(plan.mask, batch, heads), seen_bits=seen, order=None, key_order=None, bias=None
        )
        return cls(folded, moved, valid.flatten(0, 1), plan.order, (batch, heads))

    def unfold(self, out: Tensor, lse: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Output ``[B, H, S, D]`` and log-sum-exp ``[B, H, S]`` in natural order."""
        out = out.squeeze(1).unflatten(0, self.shape)
        lse = None if lse is None else lse.squeeze(1).unflatten(0, self.shape)
        if self.order is None:
            return out, lse
        out = unpermute_tokens(out, self.order)
        if lse is not None:
            lse = unpermute_tokens(lse[..., None].contiguous(), self.order)[..., 0]
        return out, lse


def _moved(x: Tensor, order: TokenOrder | None) -> Tensor:
    return x if order is None else permute_tokens(x, order)


def _fold(x: Tensor, batch: int, heads: int) -> Tensor:
    """``[B|1, H|1, ...]`` to ``[B * H, 1, ...]``."""
    return x.expand(batch, heads, *x.shape[2:]).reshape(batch * heads, 1, *x.shape[2:]).contiguous()


def _folded_mask(mask: BlockMask, batch: int, heads: int) -> BlockMask:
    lists = mask.lists()
    rows = [_fold(x, batch, heads) for x in (lists.row_start, lists.full)]
    partial = None if lists.partial is None else _fold(lists.partial, batch, heads)
    folded = BlockLists(rows[0], rows[1], partial, lists.indices, lists.block_q, lists.block_k)
    bits = _fold(mask.bits, batch, heads)
    partial_bits = None if mask.partial_bits is None else _fold(mask.partial_bits, batch, heads)
    return dataclasses.replace(mask, bits=bits, partial_bits=partial_bits, _lists=folded)
