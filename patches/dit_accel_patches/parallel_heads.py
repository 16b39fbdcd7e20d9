"""Which heads a process computes, and plans for them.

Plans are made for the heads at hand. Rules that choose blocks by comparing heads see the scores of all of them, gathered
before the choice, so a plan is that of one process. Where lists differ in length, heads are dealt out anew by the work
that their plan has (the head-level balance of db-SP, arXiv 2511.23113): all processes know the lengths, sort the heads by
them and deal them out to and fro, on the device and without waiting for it. The masks move along; what was computed on the
way, such as orders by k-means, does not, and then heads stay where they were.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from dit_accel._specs import parse_spec
from dit_accel.adapter import StepInfo
from dit_accel.context import PlanContext
from dit_accel.geometry import TokenGeometry
from dit_accel.mask import BlockMask
from dit_accel.method import Method
from dit_accel.plan import Plan
from dit_accel.planner import Planner
from dit_accel.score import Scores
from dit_accel.selection import SELECTIONS
from dit_accel.static_plan import StaticPlan
from dit_accel_kernels.types import TokenOrder
from dit_accel_patches.parallel_exchange import Ranks, even_counts

__all__ = ["SharedHeads", "SharedPlanner", "SharedStatic", "dealt", "why_not_shared"]

#: Selections that give every head as many blocks as any other, whatever the scores.
_SAME_WORK = ("top_k", "top_k_head")
#: Scores that look at several heads at once.
_JOINT_SCORES = ("proxy", "region")


def why_not_shared(method: Method) -> str | None:
    """Reason why a method cannot be planned by processes that have some of the heads each, or ``None``."""
    name = parse_spec(method.score).name
    told = "under context parallelism, where a process has only some of them; use another score, such as 'mass'"
    if name in _JOINT_SCORES:
        return f"score {name!r} compares queries and keys of all heads, which is not offered {told}"
    if name == "stripes" and method.density is not None:
        return f"score 'stripes' with a density searches one threshold for all heads, which is not offered {told}"
    return None


def dealt(work: Tensor, parts: int) -> Tensor:
    """Heads in the order in which they are dealt out so that the sums of work are even, int64 ``[H]``.

    Sorted by falling work, heads go to the processes to and fro. Those that do not fill a round are the lightest.

    Args:
        work: ``[H]``.
        parts: processes; the first ``H % parts`` get one head more, as :func:`even_counts` has it.
    """
    ranked = work.argsort(descending=True, stable=True)
    return ranked[_to_and_fro(work.shape[0], parts, work.device)]


@lru_cache(maxsize=32)
def _to_and_fro(heads: int, parts: int, device: torch.device) -> Tensor:
    """Which ranks of a sorted list go to the first process, to the second and so on."""
    whole = heads // parts
    places = []
    for part in range(parts):
        places += [turn * parts + (parts - 1 - part if turn % 2 else part) for turn in range(whole)]
        places += [whole * parts + part] if part < heads % parts else []
    return torch.tensor(places, device=device)


@dataclass(frozen=True, eq=False)
class SharedHeads:
    """The heads of an attention call that this process has.

    Attributes:
        ranks: the processes.
        total: heads of the model.
        device: where the call is.
        placement: int64 ``[H]``, heads in the order in which they are dealt out, or ``None`` for their own order.
    """

    ranks: Ranks
    total: int
    device: torch.device
    placement: Tensor | None = None

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Heads of each process."""
        return even_counts(self.total, self.ranks.size)

    @cached_property
    def index(self) -> Tensor:
        """Numbers of the heads of this process, int64 ``[h]``."""
        order = torch.arange(self.total, device=self.device) if self.placement is None else self.placement
        mine: Tensor = order.split(self.counts)[self.ranks.rank]
        return mine

    @cached_property
    def _back(self) -> Tensor | None:
        return None if self.placement is None else self.placement.argsort()

    def deal(self, x: Tensor, dim: int) -> Tensor:
        """All heads, from their own order into that of dealing out."""
        return x if self.placement is None else x.index_select(dim, self.placement)

    def collect(self, x: Tensor, dim: int) -> Tensor:
        """Undo :meth:`deal`."""
        return x if self._back is None else x.index_select(dim, self._back)

    def gather(self, x: Tensor, dim: int = 1) -> Tensor:
        """All heads in their own order, from those of each process."""
        return self.collect(self.ranks.join(x, self.counts, dim), dim)

    def local(self, x: Tensor, dim: int = 1) -> Tensor:
        """The heads of this process, from all in their own order."""
        return x.index_select(dim, self.index)

    def why_not(self, method: Method, controlled: bool) -> str | None:
        """Reason why a method cannot be shared, or ``None``; ``controlled`` says that densities are chosen by head."""
        if controlled:
            return "a target error or profile chooses densities by looking at all heads; give a density instead"
        return why_not_shared(method)

    def planner(self, known: Planner) -> SharedPlanner:
        """What makes plans of the heads of this process, in place of ``known``."""
        if not isinstance(known, SharedPlanner):
            return SharedPlanner(known.method, self)
        known.share = self
        return known

    def static(self, known: Any) -> Any:
        """A static plan cut to the heads of this process, in place of ``known``; ``None`` stays ``None``."""
        if isinstance(known, StaticPlan):
            return SharedStatic(known, self)
        return known

    def kept(self, method: Method, plan: Plan, memory: Any) -> Plan:
        """The plan that later calls use: this one, or that of other heads whose work is even over the processes.

        Args:
            method: the method.
            plan: made for the heads of this process; its density is that of all heads.
            memory: what slots keep for later plans; if there is any, heads stay.
        """
        even = parse_spec(method.select).name in _SAME_WORK or plan.density.shape[1] != self.total
        fixed = plan.gather is not None or plan.state is not None or plan.parts or memory
        if even or fixed:
            return plan
        moved = dataclasses.replace(self, placement=dealt(plan.density.mean(0), self.ranks.size))
        return self._moved(plan, moved)

    def _moved(self, plan: Plan, there: SharedHeads) -> Plan:
        """The part of a plan of all processes that belongs to ``there``."""

        def taken(x: Tensor | None) -> Tensor | None:
            return None if x is None else there.local(self.gather(x))

        def order(found: TokenOrder | None) -> TokenOrder | None:
            return None if found is None else TokenOrder(found.table, there.local(self.gather(found.head, 0), 0))

        mask, first = plan.mask, order(plan.order)
        bits = taken(mask.bits)
        assert bits is not None
        return dataclasses.replace(
            plan,
            mask=BlockMask(
                bits, taken(mask.partial_bits), mask.q_len, mask.k_len, mask.block_q, mask.block_k, mask.capacity
            ),
            order=first,
            key_order=first if plan.key_order is plan.order else order(plan.key_order),
            seen_bits=taken(plan.seen_bits),
            lse=taken(plan.lse),
            recall=None,
            placement=there,
        )


class SharedPlanner(Planner):
    """Makes the plans of the heads that this process has, as one process would make them.

    Attributes:
        share: which heads the call at hand has.
    """

    together = False  # every choice of blocks goes through :meth:`_select`, a batch element at a time

    def __init__(self, method: Method, share: SharedHeads) -> None:
        super().__init__(method)
        self.share = share

    def plan(self, ctx: PlanContext) -> Plan:
        """Make a plan; its density is that of all heads."""
        plan = super().plan(ctx)
        plan.placement = self.share
        # Counted apart by number, since one head of a process looks like one mask for all.
        alike = self.method.is_geometric and plan.order is None
        if not alike and self.method.content_order is None:
            plan.density = self.share.gather(plan.density)
        gather = plan.gather
        if gather is not None and isinstance(gather.work, Tensor) and gather.work.ndim == 2:
            plan.gather = dataclasses.replace(gather, work=self.share.gather(gather.work))
        return plan

    def _plan_by_scores(self, ctx: PlanContext, names: tuple[str, ...]) -> Plan:
        plan = super()._plan_by_scores(ctx, names)
        if self.method.content_order is not None:
            plan.density = self.share.gather(plan.density)
        return plan

    def _select(self, ctx: PlanContext, names: tuple[str, ...], scores: Scores) -> tuple[Tensor, int | None]:
        """Levels of the heads at hand, chosen among the scores of all where the selection compares heads."""
        share, rule = self.share, self.method.select
        apart = ctx.density is None and SELECTIONS.trait(rule, "by_head", False)
        if apart or parse_spec(rule).name in _SAME_WORK:
            return super()._select(ctx, names, scores)
        values, insist = scores.values, scores.insist
        if insist is not None:
            insist = share.gather(insist.expand(values.shape))
        whole = dataclasses.replace(scores, values=share.gather(values), insist=insist)
        levels, bound = super()._select(ctx, names, whole)
        return share.local(levels), bound


class SharedStatic:
    """A static plan of all heads, cut to those of this process.

    Args:
        whole: the plan as it was calibrated.
        share: which heads the call at hand has.
    """

    def __init__(self, whole: StaticPlan, share: SharedHeads) -> None:
        self.whole = whole
        self.share = share
        self._cut: dict[int, tuple[Plan, Plan]] = {}

    def why_not(self, geometry: TokenGeometry | str, layer: int, heads: int) -> str | None:
        """Reason why the plan does not serve a call, or ``None``."""
        return self.whole.why_not(geometry, layer, self.share.total)

    def plan(self, planner: Planner, geometry: TokenGeometry, layer: int, step: StepInfo, device: torch.device) -> Plan:
        """The plan of a layer at a step for the heads of this process."""
        whole = self.whole.plan(planner, geometry, layer, step, device)
        known = self._cut.get(layer)
        if known is None or known[0] is not whole:
            self._cut[layer] = known = whole, self._of(whole)
        return known[1]

    def _of(self, whole: Plan) -> Plan:
        share, mask = self.share, whole.mask
        made = BlockMask(share.local(mask.bits), None, mask.q_len, mask.k_len, mask.block_q, mask.block_k)
        order = whole.order
        if order is not None:
            order = TokenOrder(order.table, share.local(order.head, 0))
        return dataclasses.replace(whole, mask=made, order=order, key_order=order)
