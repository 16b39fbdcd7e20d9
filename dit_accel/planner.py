"""Making plans: order, scores, selection and forced blocks for one geometry."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from dit_accel.geometry import TokenGeometry
from dit_accel.mask import BlockMask
from dit_accel.method import Method
from dit_accel.order import extra_blocks, token_order
from dit_accel.plan import Plan, valid_in_block_order
from dit_accel.select import Forced, select
from dit_accel.window_plan import window_plan
from dit_accel_kernels import block_mass, block_stats, permute_tokens
from dit_accel_kernels.types import TokenOrder

__all__ = ["SAMPLED_ROWS", "Planner"]

#: Most query blocks looked at when a head chooses its order; shorter sequences look at a sixteenth.
SAMPLED_ROWS = 16

_MAX_GEOMETRIES = 8


class _Layout:
    """What depends on the geometry alone: order table and forced blocks, on one device."""

    def __init__(self, method: Method, geometry: TokenGeometry, device: torch.device) -> None:
        self.names, self.table = _candidates(method.order, geometry, device)
        identity = self.table is None
        rows = extra_blocks(geometry, identity, method.block_q)
        cols = extra_blocks(geometry, identity, method.block_k)
        if method.static:  # PAROAttention forces the last block row and column
            rows, cols = rows.clone(), cols.clone()
            rows[-1] = cols[-1] = True
        self.forced = Forced.of(rows, cols, device)
        self.window_plans: dict[tuple[float, int], Plan] = {}

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
    """Makes the plans of one method. Holds what all layers share, bounded by geometry."""

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

    def window_plan(self, geometry: TokenGeometry, device: torch.device, density: float, heads: int) -> Plan:
        """The plan of a method whose mask follows from the geometry; one for all layers and heads.

        Args:
            geometry: where the tokens sit.
            device: where the mask goes.
            density: share of blocks to keep, where the method gives no window.
            heads: attention heads.

        Raises:
            ValueError: if the window does not fit the grid.
        """
        layout = self.layout(geometry, device)
        known = layout.window_plans.get((density, heads))
        if known is None:
            layout.window_plans.clear()
            known = window_plan(self.method, geometry, layout.names, layout.table, device, density, heads)
            layout.window_plans[(density, heads)] = known
        return known

    def costs(self, geometry: TokenGeometry) -> tuple[float, float]:
        """Work of a run's first plan and of each later one, in dense attentions: the order is chosen once."""
        mass = 0.5 if self.method.score == "mass" else 0.0
        choice = 0.0
        if self.method.order_choice != "fixed":
            names = self.layout(geometry, torch.device("cpu")).names
            rows = sampled_count(-(-geometry.tokens // self.method.block_q))
            choice = 0.5 * len(names) * rows * self.method.block_q / geometry.tokens if len(names) > 1 else 0.0
        return mass + choice, mass

    def plan(
        self,
        query: Tensor,
        key: Tensor,
        lse: Tensor | None,
        geometry: TokenGeometry,
        *,
        density: float,
        scale: float | None,
        key_valid: Tensor | None = None,
        order: TokenOrder | None = None,
    ) -> Plan:
        """Make a plan from queries and keys ``[B, H, S, D]`` of one layer in natural order.

        Args:
            query: queries.
            key: keys.
            lse: float32 ``[B, H, S]`` log-sum-exp of this or an earlier step; only ``"mass"`` and a
                choice of orders need it.
            geometry: where the tokens sit.
            density: share of blocks to keep.
            scale: factor of the logits.
            key_valid: bool ``[B, S]`` or ``None``.
            order: order found earlier; ``None`` chooses.
        """
        method = self.method
        layout = self.layout(geometry, query.device)
        cost = 0.0
        if order is None and layout.table is not None:
            if layout.table.shape[0] == 1:
                order = fixed_order(layout.table, query.shape[1])
            else:
                recalls, cost = self.order_recall(query, key, lse, geometry, density, scale, key_valid)
                order = layout.order(recalls.argmax(0))
        scores, score_cost = self.scores(query, key, lse, order, scale, key_valid)
        levels, capacity = select(method.select, scores, density, layout.forced)
        mask = BlockMask.from_levels(
            levels, query.shape[2], key.shape[2], method.block_q, method.block_k, capacity=capacity
        )
        return Plan(
            mask=mask,
            order=order,
            order_names=layout.names,
            windows=None,
            compensate=method.compensate == "mean",
            density=mask.density(),
            cost=cost + score_cost,
            finite=torch.isfinite(scores).all(),
            recall=(scores * levels).sum(-1).mean(-1) if method.score == "mass" else None,
        )

    def scores(
        self,
        query: Tensor,
        key: Tensor,
        lse: Tensor | None,
        order: TokenOrder | None,
        scale: float | None,
        key_valid: Tensor | None,
    ) -> tuple[Tensor, float]:
        """Block scores ``[B, H, Qb, Kb]`` and their cost in dense attentions."""
        method = self.method
        keys = key if order is None else permute_tokens(key, order)
        valid = valid_in_block_order(key_valid, order)
        if method.score == "mass":
            if lse is None:
                raise ValueError("block mass needs the log-sum-exp of a dense step, got None")
            mass = block_mass(
                query,
                keys,
                lse,
                block_q=method.block_q,
                block_k=method.block_k,
                scale=scale,
                order=order,
                key_valid=valid,
            )
            return mass, 0.5
        queries = query if order is None else permute_tokens(query, order)
        mean_q = block_stats(queries, block=method.block_q).mean.float()
        mean_k, _, count = block_stats(keys, block=method.block_k, key_valid=valid)
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        logits = torch.einsum("bhqd,bhkd->bhqk", mean_q * factor, mean_k.float())
        logits = logits + count.to(torch.float32).log()[:, None, None]
        return logits.softmax(-1), 0.5 / (method.block_q * method.block_k)

    def order_recall(
        self,
        query: Tensor,
        key: Tensor,
        lse: Tensor | None,
        geometry: TokenGeometry,
        density: float,
        scale: float | None,
        key_valid: Tensor | None,
    ) -> tuple[Tensor, float]:
        """Softmax mass that the best blocks of sampled rows would keep under each candidate order.

        Returns:
            float32 ``[N, H]`` recall, averaged over the batch, and the cost in dense attentions.
        """
        method = self.method
        if lse is None:
            raise ValueError("a choice of orders needs the log-sum-exp of a dense step, got None")
        table = self.layout(geometry, query.device).table
        assert table is not None
        rows = sampled_rows(-(-query.shape[2] // method.block_q), query.device)
        recalls = []
        for candidate in range(table.shape[0]):
            order = fixed_order(table[candidate : candidate + 1], query.shape[1])
            mass = block_mass(
                query,
                permute_tokens(key, order),
                lse,
                block_q=method.block_q,
                block_k=method.block_k,
                scale=scale,
                rows=rows,
                order=order,
                key_valid=valid_in_block_order(key_valid, order),
            )
            mass = torch.nan_to_num(mass, nan=0.0, posinf=0.0, neginf=0.0)
            kept = mass.topk(max(round(density * mass.shape[-1]), 1), dim=-1).values
            recalls.append(kept.sum(-1).mean((0, 2)))
        cost = 0.5 * table.shape[0] * rows.shape[0] * method.block_q / query.shape[2]
        return torch.stack(recalls), cost


def fixed_order(table: Tensor, heads: int) -> TokenOrder:
    """The order in which every head uses the one row of ``table``."""
    return TokenOrder(table, torch.zeros(heads, dtype=torch.int32, device=table.device))


def sampled_count(blocks: int) -> int:
    """How many of ``blocks`` query blocks are looked at when a head chooses its order."""
    return min(SAMPLED_ROWS, max(4, blocks // 16), blocks)


def sampled_rows(blocks: int, device: torch.device) -> Tensor:
    """Evenly spread query blocks, int32 ``[sampled_count(blocks)]``."""
    count = sampled_count(blocks)
    centres = (torch.arange(count, device=device, dtype=torch.float64) + 0.5) * blocks / count
    return centres.to(torch.int32)
