"""The registry of block scores, and what a rule returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dit_accel._specs import Registry
from dit_accel_kernels.types import GatheredKeys

if TYPE_CHECKING:
    from dit_accel.context import PlanContext

__all__ = ["SCORES", "Gather", "Scores", "block_scores"]


@dataclass(frozen=True, eq=False)
class Gather:
    """Keys that a plan gathers besides its blocks.

    Attributes:
        keys: ``(key, value, key_valid) -> GatheredKeys``; called on every sparse call with the keys and values
            ``[B, H, S, D]`` of that call in block order.
        work: share of dense attention that they cost, a 0-dim or ``[B|1, H|1]`` float32 tensor on the device, or a number.
    """

    keys: Callable[[Tensor, Tensor, Tensor | None], GatheredKeys]
    work: Tensor | float


@dataclass(frozen=True, eq=False)
class Scores:
    """What a score rule says.

    Attributes:
        values: float32 ``[B, H, Qb, Kb]``, larger is more important; a row of softmax mass sums to one.
        insist: bool ``[B|1, H|1, Qb, Kb]``, blocks that the rule keeps whatever the selection says, or ``None``.
        gather: single keys or pooled keys that the plan gathers besides, or ``None``.
        is_mass: whether the values are shares of softmax mass, so that what is kept can be called recall.
    """

    values: Tensor
    insist: Tensor | None = None
    gather: Gather | None = None
    is_mass: bool = False


SCORES: Registry[Scores | Tensor] = Registry("score")
"""Rules ``(ctx, *values) -> Scores | Tensor``.

Traits: ``needs_lse`` (bool) for rules that need the log-sum-exp of dense attention; ``cost``, work in dense attentions that
is known beforehand: a number or ``(method, geometry) -> float``. A rule counts what it has really done by ``ctx.spend``.
``by_head`` (bool) for rules that score every head apart from the others, by queries, keys and the log-sum-exp alone, and
gather nothing: several batch elements of a content order are then scored as further heads of one.
"""


def block_scores(ctx: PlanContext) -> Scores:
    """Scores by the method's rule; values that are not finite are left as they are."""
    found = SCORES.create(ctx.method.score, ctx)
    if isinstance(found, Tensor):
        found = Scores(found)
    expected = (ctx.q_blocks, ctx.k_blocks)
    if found.values.dtype != torch.float32 or tuple(found.values.shape[2:]) != expected:
        raise ValueError(
            f"score {ctx.method.score!r} must give float32 [B, H, {expected[0]}, {expected[1]}], "
            f"got {found.values.dtype} {list(found.values.shape)}"
        )
    return found
