"""``precision="auto"``: which heads stand 8-bit operands, measured on the first sparse call of each layer in a run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dit_accel.compensate import Compensation
from dit_accel.mask import BlockMask
from dit_accel.plan import Plan, execute
from dit_accel_kernels.quantize import Precision
from dit_accel_kernels.types import TokenOrder

__all__ = ["HeadPrecisions", "Settled", "head_errors", "with_precision"]

#: Where heads cannot be computed apart, the layer follows the many if fewer than this share of them are sensitive.
_FEW = 0.25


def head_errors(got: Tensor, want: Tensor) -> Tensor:
    """Relative L2 error of each head, float32 ``[H]``, of outputs ``[B, H, S, D]``."""
    miss = (got.float() - want.float()).square().sum((0, 2, 3))
    size = want.float().square().sum((0, 2, 3))
    return (miss / size.clamp(min=torch.finfo(torch.float32).tiny)).sqrt()


def with_precision(plan: Plan, precision: Precision, wide: tuple[int, ...], heads: int) -> Plan:
    """A plan whose heads use ``precision``, but for some that stay in 16 bit.

    Two calls take the two groups. What a compensation keeps for the heads of a layer cannot be cut: there all heads follow
    the many, in 16 bit if a quarter of them or more must be.

    Args:
        plan: in 16 bit.
        precision: the number formats.
        wide: heads that stay in 16 bit.
        heads: heads of the call.
    """
    if plan.parts:
        return dataclasses.replace(
            plan, parts=tuple(with_precision(part, precision, wide, heads) for part in plan.parts)
        )
    if wide and not _divides(plan):
        wide = () if len(wide) < _FEW * heads else tuple(range(heads))
    if len(wide) == heads:
        return plan
    if not wide:
        return dataclasses.replace(plan, precision=precision)
    device, narrow = plan.mask.bits.device, [head for head in range(heads) if head not in wide]
    groups = []
    for chosen, kind in ((narrow, precision), (list(wide), None)):
        index = torch.tensor(chosen, device=device)
        groups.append((index, dataclasses.replace(_of_heads(plan, index), precision=kind)))
    return dataclasses.replace(plan, groups=tuple(groups))


def _divides(plan: Plan) -> bool:
    """Whether groups of heads can have plans of their own."""
    kind = type(plan.compensation)
    return kind.prepare is Compensation.prepare and kind.settle is Compensation.settle and plan.state is None


def _of_heads(plan: Plan, index: Tensor) -> Plan:
    """The part of a plan that belongs to some heads."""

    def cut(order: TokenOrder | None) -> TokenOrder | None:
        return None if order is None else TokenOrder(order.table, order.head.index_select(0, index))

    mask = plan.mask
    if plan.heads > 1:
        bits = mask.bits.index_select(1, index)
        # Every block of a row may be kept: a capacity of all heads need not do for the densest.
        mask = BlockMask(bits, None, mask.q_len, mask.k_len, mask.block_q, mask.block_k)
    density = plan.density.index_select(1, index) if plan.density.shape[1] > 1 else plan.density
    order = cut(plan.order)
    key_order = order if plan.key_order is plan.order else cut(plan.key_order)
    return dataclasses.replace(
        plan, mask=mask, density=density, order=order, key_order=key_order, lse=None, recall=None, bias=None
    )


class Settled(NamedTuple):
    """What became of a plan.

    Attributes:
        plan: to carry out.
        wide: heads that stay in 16 bit.
        measured: whether this call measured them, by one call in 8 bit and one in 16.
    """

    plan: Plan
    wide: tuple[int, ...]
    measured: bool


@dataclass
class _Known:
    wide: tuple[int, ...]
    source: Plan
    plan: Plan


class HeadPrecisions:
    """The choices of one run, by layer and whatever else tells plans apart.

    The first sparse call of a layer is computed in both formats and the errors are read, for which the host waits once;
    later plans of the run keep the choice.

    Args:
        max_error: relative L2 error above which a head stays in 16 bit.
    """

    def __init__(self, max_error: float) -> None:
        self.max_error = max_error
        self._known: dict[Any, _Known] = {}

    def clear(self) -> None:
        """Forget all choices."""
        self._known.clear()

    def settle(
        self, key: Any, plan: Plan, precision: Precision, tensors: tuple[Tensor, Tensor, Tensor], **options: Any
    ) -> Settled:
        """Put the formats into a plan, measuring them if this layer has not been measured in this run.

        Args:
            key: what the choice belongs to, such as the layer and the guidance branch.
            plan: in 16 bit.
            precision: formats of the heads that stand them.
            tensors: query, key and value ``[B, H, S, D]`` in natural order.
            **options: ``scale``, ``key_valid`` and ``backend`` of :func:`dit_accel.plan.execute`.
        """
        if any(leaf.windows is not None or leaf.gather is not None for leaf in plan.leaves):
            return Settled(plan, tuple(range(tensors[0].shape[1])), False)
        known, heads = self._known.get(key), tensors[0].shape[1]
        if known is not None and known.source is plan:
            return Settled(known.plan, known.wide, False)
        if known is None and tensors[0].is_cuda and torch.cuda.is_current_stream_capturing():
            return Settled(plan, tuple(range(heads)), False)  # nothing can be read while a graph is recorded
        wide = self._measure(plan, precision, tensors, **options) if known is None else known.wide
        settled = with_precision(plan, precision, wide, heads)
        used = {id(leaf.mask) for leaf in settled.leaves}
        for leaf in plan.leaves:
            if id(leaf.mask) not in used:
                leaf.mask.drop_lists()  # those of all heads together are not needed again
        wide = wide_heads(settled, heads)
        self._known[key] = _Known(wide, plan, settled)
        return Settled(settled, wide, known is None)

    def _measure(
        self, plan: Plan, precision: Precision, tensors: tuple[Tensor, Tensor, Tensor], **options: Any
    ) -> tuple[int, ...]:
        """Heads whose output is too far from the 16-bit one on the same plan; what is not finite is too far."""
        narrow = with_precision(plan, precision, (), tensors[0].shape[1])
        errors = head_errors(execute(narrow, *tensors, **options), execute(plan, *tensors, **options))
        return tuple(head for head, error in enumerate(errors.tolist()) if not error <= self.max_error)


def wide_heads(plan: Plan, heads: int) -> tuple[int, ...]:
    """Heads of a plan that are computed in 16 bit; batch elements are alike."""
    if plan.parts:
        return wide_heads(plan.parts[0], heads)
    if plan.groups:
        return tuple(int(head) for index, group in plan.groups if group.precision is None for head in index.tolist())
    return () if plan.precision is not None else tuple(range(heads))
