"""What a slot may look at while the plan of one attention layer is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dit_accel.adapter import StepInfo
from dit_accel.geometry import TokenGeometry
from dit_accel_kernels import block_stats, permute_tokens
from dit_accel_kernels.stats import BlockStats
from dit_accel_kernels.types import TokenOrder

if TYPE_CHECKING:
    from dit_accel.method import Method
    from dit_accel.selection import Forced
    from dit_accel.targets.control import Control

__all__ = ["PlanContext", "valid_in_block_order"]


def valid_in_block_order(key_valid: Tensor | None, order: TokenOrder | None) -> Tensor | None:
    """Move a key-valid vector ``[B, S]`` to block order.

    Every order moves the visual tokens among themselves and puts the others in the same places, so the order of the first
    head serves all of them unless visual tokens are masked; for those see :mod:`dit_accel.masked`.
    """
    if key_valid is None or order is None:
        return key_valid
    return key_valid[:, order.table.index_select(0, order.head[:1])[0].long()]


@dataclass(eq=False)
class PlanContext:
    """Inputs of a plan. *Natural order* is the model's; *block order* is that of :attr:`order` and :attr:`key_order`.

    Attributes:
        method: what to do.
        geometry: where the tokens sit.
        query: ``[B, H, S, D]`` in natural order, after RoPE.
        key: like ``query``.
        value: like ``query``; ``None`` where the caller has none.
        lse: float32 ``[B, H, S]`` log-sum-exp of this or an earlier step, natural logarithm, or ``None``.
        scale: factor of the logits.
        key_valid: bool ``[B, S]`` in natural order, false for padding, or ``None``.
        density: share of the map to compute, or ``None`` where the selection's own parameter decides.
        forced: blocks that are exact whatever their score.
        layer: index of the layer.
        step: where the call stands in the run.
        memory: what slots keep for this layer and branch from one plan to the next of the same run.
        dense_out: output of dense attention ``[B, H, S, D]`` where this step has computed it, or ``None``.
        order: token order of the queries, once chosen.
        key_order: token order of the keys and values, once chosen; the same as ``order`` unless content decides.
        candidate_levels: levels ``[1, N, Qb, Kb]`` of the pattern under each candidate order, on the device, where a head
            chooses the order of a pattern.
        control: what gives each head its density, or ``None`` where all have :attr:`density`.
        cost: work done for the plan so far, in dense attentions of this layer; see :meth:`spend`.
        notes: things worth knowing that the status is to say.
    """

    method: Method
    geometry: TokenGeometry
    query: Tensor
    key: Tensor
    value: Tensor | None
    lse: Tensor | None
    scale: float
    key_valid: Tensor | None
    density: float | None
    forced: Forced
    layer: int = 0
    step: StepInfo = field(default_factory=StepInfo)
    memory: dict[str, Any] = field(default_factory=dict)
    dense_out: Tensor | None = None
    order: TokenOrder | None = None
    key_order: TokenOrder | None = None
    candidate_levels: Tensor | None = None
    control: Control | None = None
    cost: float = 0.0
    notes: list[str] = field(default_factory=list)

    def spend(self, cost: float) -> None:
        """Count work, in dense attentions of this layer: ``4 B H S^2 D`` flops are 1, its ``Q K^T`` alone 0.5."""
        self.cost += cost

    @property
    def block_q(self) -> int:
        """Tokens in a query block."""
        return self.method.block_q

    @property
    def block_k(self) -> int:
        """Tokens in a key block."""
        return self.method.block_k

    @property
    def q_blocks(self) -> int:
        """Number of query blocks ``Qb``."""
        return -(-self.query.shape[2] // self.block_q)

    @property
    def k_blocks(self) -> int:
        """Number of key blocks ``Kb``."""
        return -(-self.key.shape[2] // self.block_k)

    @cached_property
    def queries(self) -> Tensor:
        """Queries in block order, ``[B, H, S, D]``."""
        return self.query if self.order is None else permute_tokens(self.query, self.order)

    @cached_property
    def keys(self) -> Tensor:
        """Keys in block order, ``[B, H, S, D]``."""
        return self.key if self.key_order is None else permute_tokens(self.key, self.key_order)

    @cached_property
    def values(self) -> Tensor:
        """Values in block order, ``[B, H, S, D]``.

        Raises:
            ValueError: if the caller gave none.
        """
        if self.value is None:
            raise ValueError("this method looks at the values, and the caller of the planner gave none")
        return self.value if self.key_order is None else permute_tokens(self.value, self.key_order)

    @cached_property
    def valid(self) -> Tensor | None:
        """Key-valid vector in block order, bool ``[B, S]`` or ``None``."""
        return valid_in_block_order(self.key_valid, self.key_order)

    @cached_property
    def query_stats(self) -> BlockStats:
        """Mean, spread and count of each query block; see :func:`dit_accel_kernels.block_stats`."""
        return block_stats(self.queries, block=self.block_q)

    @cached_property
    def key_stats(self) -> BlockStats:
        """Mean, spread and valid count of each key block."""
        return block_stats(self.keys, block=self.block_k, key_valid=self.valid)
