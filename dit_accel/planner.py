"""Making plans: order, scores, selection and forced blocks for one geometry."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dit_accel.choice import CHOICES
from dit_accel.compensate import make_compensation
from dit_accel.content import CONTENT_ORDERS, ContentOrder
from dit_accel.content_plan import plan_together, plans_together
from dit_accel.context import PlanContext
from dit_accel.geometry import TokenGeometry
from dit_accel.mask import BlockMask
from dit_accel.masked import one_for_all
from dit_accel.method import Method
from dit_accel.order import extra_blocks, token_order
from dit_accel.pattern import PATTERNS, PatternContext, make_pattern
from dit_accel.pattern_plan import on_device, pattern_plan, with_forced
from dit_accel.plan import Plan
from dit_accel.pyramid import pyramid_gather
from dit_accel.score import Scores, block_scores
from dit_accel.selection import SELECTIONS, Forced, select
from dit_accel_kernels.lists import pack_bits
from dit_accel_kernels.types import TokenOrder, TokenWindows

__all__ = ["Planner"]

_MAX_GEOMETRIES = 8
_LEAST = 1e-4  # of the map; at least one block a row is kept in any case


class _Layout:
    """What depends on the geometry alone: order table and forced blocks, on one device."""

    def __init__(self, method: Method, geometry: TokenGeometry, device: torch.device) -> None:
        content = method.content_order is not None
        self.names, self.table = (method.order, None) if content else _candidates(method.order, geometry, device)
        self.moves_queries = self.moves_keys = self.table is not None
        self.method, self.geometry, self.device = method, geometry, device
        self._forced: dict[tuple[bool, bool], Forced] = {}
        self.forced = self.forced_blocks(self.moves_queries, self.moves_keys)
        self.pattern_plans: dict[tuple[float | None, int, int], Plan] = {}
        self.pattern_levels: dict[tuple[float | None, int, int], tuple[Tensor, TokenWindows | None]] = {}

    def forced_blocks(self, moved_queries: bool, moved_keys: bool) -> Forced:
        """Blocks with extra tokens, for orders that move queries or keys or leave them; made once, on the device."""
        key = (moved_queries, moved_keys)
        if key not in self._forced:
            self._forced[key] = self._make_forced(*key)
        return self._forced[key]

    def _make_forced(self, moved_queries: bool, moved_keys: bool) -> Forced:
        rows = extra_blocks(self.geometry, not moved_queries, self.method.block_q)
        cols = extra_blocks(self.geometry, not moved_keys, self.method.block_k)
        if self.method.static:  # PAROAttention forces the last block row and column
            rows, cols = rows.clone(), cols.clone()
            rows[-1] = cols[-1] = True
        tokens, sizes = self.geometry.tokens, []
        for block in (self.method.block_q, self.method.block_k):
            starts = torch.arange(0, tokens, block)
            sizes.append((tokens - starts).clamp(max=block).float() / tokens)
        return Forced.of(rows, cols, self.device, sizes=(sizes[0], sizes[1]))

    def order(self, choice: Tensor) -> TokenOrder | None:
        """Orders of all heads, from the index of a candidate per head, integers ``[H]``."""
        return None if self.table is None else TokenOrder(self.table, choice.to(torch.int32))


def _candidates(
    names: Sequence[str], geometry: TokenGeometry, device: torch.device
) -> tuple[tuple[str, ...], Tensor | None]:
    """Candidate orders that differ on this grid, and their table; no table if nothing moves."""
    first = token_order(names, torch.zeros(1, dtype=torch.int32), geometry)
    if first is None:
        return (names[0],), None
    kept: list[int] = []
    for i in range(len(names)):
        if not any(torch.equal(first.table[i], first.table[j]) for j in kept):
            kept.append(i)
    return tuple(names[i] for i in kept), first.table[kept].to(device)


class Planner:
    """Makes the plans of one method. Holds what all layers share, bounded by geometry.

    Attributes:
        together: whether batch elements with orders of their own may be planned as further heads of one.
    """

    together = True

    def __init__(self, method: Method) -> None:
        self.method = method
        self._layouts: OrderedDict[tuple[TokenGeometry, torch.device], _Layout] = OrderedDict()

    def layout(self, geometry: TokenGeometry, device: torch.device) -> _Layout:
        """Order table and forced blocks for a geometry, made once."""
        key = (geometry, device)
        if key not in self._layouts:
            self._layouts[key] = _Layout(self.method, geometry, device)
            while len(self._layouts) > _MAX_GEOMETRIES:
                self._layouts.popitem(last=False)
        self._layouts.move_to_end(key)
        return self._layouts[key]

    def costs(self, geometry: TokenGeometry) -> tuple[float, float]:
        """Work of a run's first plan and of each later one, in dense attentions; see :meth:`Method.plan_costs`."""
        return self.method.plan_costs(geometry, len(self.layout(geometry, torch.device("cpu")).names))

    def density_of_free_rows(self, density: float, geometry: TokenGeometry) -> float:
        """What to ask the selection for, so that with the rows that are always whole (text) the map has ``density``.

        Rules that search their strength count those rows themselves.
        """
        if not SELECTIONS.trait(self.method.select, "rows_on_top", False):
            return density
        forced = self.layout(geometry, torch.device("cpu")).forced
        assert forced.row_size is not None
        share = float(forced.row_size[forced.rows].sum())
        return max((density - share) / max(1 - share, _LEAST), _LEAST)

    def context(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor | None,
        lse: Tensor | None,
        geometry: TokenGeometry,
        *,
        density: float | None,
        scale: float | None,
        key_valid: Tensor | None = None,
        order: TokenOrder | None = None,
    ) -> PlanContext:
        """A context for the slots, with ``order`` for queries and keys."""
        return PlanContext(
            method=self.method,
            geometry=geometry,
            query=query,
            key=key,
            value=value,
            lse=lse,
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
            key_valid=key_valid,
            density=density,
            forced=self.layout(geometry, query.device).forced,
            order=order,
            key_order=order,
        )

    def pattern_plan(
        self, geometry: TokenGeometry, device: torch.device, density: float | None, heads: int, layer: int = 0
    ) -> Plan:
        """The plan of a method whose mask follows from the geometry; one for all heads, and for all layers if it may be.

        Args:
            geometry: where the tokens sit.
            device: where the mask goes.
            density: share of blocks to visit, where the method gives no parameters.
            heads: attention heads.
            layer: index of the layer, for patterns that depend on it.

        Raises:
            ValueError: if the pattern does not fit the grid.
        """
        layout = self.layout(geometry, device)
        place = layer if PATTERNS.trait(self.method.score, "by_layer", False) else 0
        key = (density, heads, place)
        if key not in layout.pattern_plans:
            index = None if layout.table is None else layout.table[0].cpu()
            ctx = PatternContext(self.method, geometry, index, density, heads, place)
            layout.pattern_plans[key] = pattern_plan(ctx, layout.names, layout.table, layout.forced, device)
        return layout.pattern_plans[key]

    def plan(self, ctx: PlanContext) -> Plan:
        """Make a plan from queries and keys of one layer.

        Args:
            ctx: what to plan from, see :meth:`context`; an ``order`` that is set is kept.
        """
        if self.method.content_order is not None:
            return self._plan_by_content(ctx)
        layout = self.layout(ctx.geometry, ctx.query.device)
        if self.method.is_geometric:
            ctx.candidate_levels = self._candidate_levels(ctx, layout)[0]
        if ctx.order is None and layout.table is not None:
            choice = CHOICES.create(self.method.order_choice, ctx, layout.table)
            if ctx.key_valid is not None and len(layout.names) > 1:
                choice = one_for_all(choice, self.method, ctx.geometry, ctx.key_valid, len(layout.names))
            order = layout.order(choice)
            ctx = dataclasses.replace(ctx, order=order, key_order=order)  # anew: what was cached was in natural order
        if self.method.is_geometric:
            return self._plan_by_pattern(ctx, layout)
        return self._plan_by_scores(ctx, layout.names)

    def _plan_by_content(self, ctx: PlanContext) -> Plan:
        """One plan for each batch element, since their tokens are ordered differently."""
        layout = self.layout(ctx.geometry, ctx.query.device)
        spec = self.method.content_order
        assert spec is not None
        if self.together and ctx.key_valid is None and ctx.control is None and plans_together(self.method):
            return plan_together(ctx, spec, layout.forced_blocks)
        parts = []
        for i in range(ctx.query.shape[0]):
            one = slice(i, i + 1)
            cut: dict[str, Any] = {
                name: _cut(getattr(ctx, name), one)
                for name in ("query", "key", "value", "lse", "key_valid", "dense_out")
            }
            memory = ctx.memory.setdefault(f"batch {i}", {})
            part = dataclasses.replace(ctx, **cut, memory=memory, cost=0.0)
            found: ContentOrder = CONTENT_ORDERS.create(spec, part)
            forced = layout.forced_blocks(found.query is not None, found.key is not None)
            part = dataclasses.replace(part, order=found.query, key_order=found.key, forced=forced)
            parts.append(self._plan_by_scores(part, (spec,)))
            ctx.spend(parts[-1].cost / ctx.query.shape[0])
        return dataclasses.replace(
            parts[0],
            density=torch.cat([p.density.expand(1, -1) for p in parts]),
            cost=ctx.cost,
            finite=_all_finite(parts),
            recall=None,
            parts=tuple(parts),
        )

    def _plan_by_scores(self, ctx: PlanContext, names: tuple[str, ...]) -> Plan:
        method = self.method
        scores = block_scores(ctx)
        levels, capacity = self._select(ctx, names, scores)
        plan = self._complete(ctx, names, levels, scores, capacity)
        make_compensation(method.compensate).settle(ctx, plan)
        plan.cost = ctx.cost
        return plan

    def _select(self, ctx: PlanContext, names: tuple[str, ...], scores: Scores) -> tuple[Tensor, int | None]:
        """Levels at the density of the run, or at those that a control gives each head."""
        shares = None if ctx.control is None else ctx.control.shares(self, ctx, names, scores)
        if shares is None:
            return select(self.method.select, scores.values, ctx.density, ctx.forced, insist=scores.insist)
        from dit_accel.targets.by_head import select_by_head  # what few use is loaded by these alone

        return select_by_head(self.method.select, scores.values, shares, ctx.forced, insist=scores.insist)

    def _complete(
        self, ctx: PlanContext, names: tuple[str, ...], levels: Tensor, scores: Scores, capacity: int | None
    ) -> Plan:
        method, compensation = self.method, make_compensation(self.method.compensate)
        gather = scores.gather
        if method.has_levels:
            gather = pyramid_gather(levels, method.block_k)
        exact = (levels == 1).to(torch.uint8) if method.has_levels else levels
        mask = BlockMask.from_levels(
            exact, ctx.query.shape[2], ctx.key.shape[2], method.block_q, method.block_k, capacity=capacity
        )
        return Plan(
            mask=mask,
            # A block that enters at a level of the pyramid must not enter as its mean besides.
            seen_bits=pack_bits((levels > 0).to(torch.uint8)) if method.has_levels else None,
            order=ctx.order,
            key_order=ctx.key_order,
            order_names=names,
            windows=None,
            compensation=compensation,
            density=mask.density(),
            cost=ctx.cost,
            gather=gather,
            state=compensation.prepare(ctx, levels),
            extra_work=compensation.work(ctx),
            finite=torch.linalg.vector_norm(scores.values, torch.inf) < torch.inf,  # one pass; false for NaN as well
            recall=(scores.values * exact).sum(-1).mean(-1) if scores.is_mass else None,
            precision=method.precision_rule.fixed,
        )

    def _plan_by_pattern(self, ctx: PlanContext, layout: _Layout) -> Plan:
        """A pattern whose order each head has chosen: its mask under each candidate, picked by head."""
        levels, windows = self._candidate_levels(ctx, layout)
        if ctx.order is not None:
            levels = levels[0, ctx.order.head.long()][None]
        mask = BlockMask.from_levels(
            levels,
            ctx.query.shape[2],
            ctx.key.shape[2],
            self.method.block_q,
            self.method.block_k,
            partial=windows is not None,
        )
        compensation = make_compensation(self.method.compensate)
        plan = Plan(
            mask=mask,
            order=ctx.order,
            key_order=ctx.key_order,
            order_names=layout.names,
            windows=windows,
            compensation=compensation,
            density=mask.density(),
            cost=ctx.cost,
            state=compensation.prepare(ctx, levels),
            extra_work=compensation.work(ctx),
            precision=self.method.precision_rule.fixed,
        )
        compensation.settle(ctx, plan)
        plan.cost = ctx.cost
        return plan

    def _candidate_levels(self, ctx: PlanContext, layout: _Layout) -> tuple[Tensor, TokenWindows | None]:
        """What :meth:`_pattern_levels` makes, once for a layout."""
        place = ctx.layer if PATTERNS.trait(self.method.score, "by_layer", False) else 0
        key = (ctx.density, ctx.query.shape[1], place)
        if key not in layout.pattern_levels:
            layout.pattern_levels[key] = self._pattern_levels(ctx, layout, place)
        return layout.pattern_levels[key]

    def _pattern_levels(self, ctx: PlanContext, layout: _Layout, place: int) -> tuple[Tensor, TokenWindows | None]:
        """Levels ``[1, N, Qb, Kb]`` of the pattern under each candidate order, on the device."""
        heads, device = ctx.query.shape[1], ctx.query.device
        tables = [None] if layout.table is None else list(layout.table.cpu())
        made = [
            make_pattern(PatternContext(self.method, ctx.geometry, index, ctx.density, heads, place))
            for index in tables
        ]
        if len(made) > 1 and any(m.windows is not None for m in made):
            raise ValueError(
                f"pattern {self.method.score!r} has token windows, which cannot differ by head; give one order"
            )
        levels = torch.cat([with_forced(m.levels[:, :1], layout.forced) for m in made], 1)
        return levels.to(device), on_device(made[0].windows, device)


def _cut(x: Tensor | None, one: slice) -> Tensor | None:
    return None if x is None else x[one]


def _all_finite(parts: Sequence[Plan]) -> Tensor | None:
    flags = [p.finite for p in parts if p.finite is not None]
    return torch.stack(flags).all() if flags else None
