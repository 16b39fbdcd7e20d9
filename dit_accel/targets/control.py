"""What gives each head of a plan its density: an error to stay below, or what a profile holds."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from dit_accel.context import PlanContext
from dit_accel.geometry import TokenGeometry
from dit_accel.method import Method
from dit_accel.policy import Policy
from dit_accel.score import Scores
from dit_accel.targets.allot import allot_error, refine
from dit_accel.targets.by_head import chooses_by_head
from dit_accel.targets.probe import DENSITIES, measure_at, why_not_probed
from dit_accel_kernels.types import TokenOrder

if TYPE_CHECKING:
    from dit_accel.planner import Planner

__all__ = ["Control", "ErrorControl"]

_MOST = 0.95


class Control(Protocol):
    """Chooses densities while plans are made. One object for one transformer."""

    def join(self, layers: tuple[str, ...]) -> None:
        """Check the attention layers that were found, by module path; raises ``ValueError`` where they do not fit."""

    def begin(self, geometry: TokenGeometry) -> list[str]:
        """A run begins; what is worth knowing about it, such as how a profile was fitted to another grid."""

    def shares(self, planner: Planner, ctx: PlanContext, names: tuple[str, ...], scores: Scores) -> Tensor | None:
        """Density of each head, float32 ``[H]``, of all together, ``[1]``, or ``None`` for the method's own."""

    def head_orders(
        self, planner: Planner, geometry: TokenGeometry, layer: int, device: torch.device
    ) -> TokenOrder | None:
        """Orders of the heads of a layer where they are fixed, or ``None``."""


class ErrorControl:
    """Keeps the relative error of each layer's attention output below a target, with the least work.

    While a plan is made, the error of every head is measured at several densities on a sample of query blocks, by sparse
    attention with the masks that the plan would have. Densities are then chosen by :func:`allot_error`: the squared errors
    of all heads over the squared output of the layer stay below the square of the target. It holds for the step at which
    the plan is made and, as far as the maps stay alike, for those that follow.

    Where the method's density falls over the run, since early steps matter more, the target rises in the same proportion:
    it is met at the mean density of the two ends.

    Args:
        error: relative L2 error, ``||sparse - dense|| / ||dense||`` of one layer's output before its projection.

    Raises:
        ValueError: if the error is not above 0 and below 1.
    """

    def __init__(self, error: float, *, backend: str | None = None) -> None:
        ok = isinstance(error, int | float) and not isinstance(error, bool) and math.isfinite(error) and 0 < error < 1
        if not ok:
            raise ValueError(f"target_error must be above 0 and below 1, a relative error of attention, got {error!r}")
        self.error = float(error)
        self.backend = backend

    @staticmethod
    def why_not(method: Method) -> str | None:
        """Why a method cannot be controlled, or ``None``."""
        return why_not_probed(method)

    def join(self, layers: tuple[str, ...]) -> None:
        """Every model will do."""

    def head_orders(
        self, planner: Planner, geometry: TokenGeometry, layer: int, device: torch.device
    ) -> TokenOrder | None:
        """Heads choose."""
        return None

    def begin(self, geometry: TokenGeometry) -> list[str]:
        """Nothing depends on the geometry."""
        return []

    def error_at(self, ctx: PlanContext) -> float:
        """The target at the step of a context."""
        wanted = ctx.method.density
        own = Policy(ctx.method).density(ctx.step) if isinstance(wanted, tuple) else None
        if own is None or not isinstance(wanted, tuple):
            return self.error
        return min(self.error * sum(wanted) / 2 / own, _MOST)

    def shares(self, planner: Planner, ctx: PlanContext, names: tuple[str, ...], scores: Scores) -> Tensor | None:
        """Densities that reach the target for this layer, float32 ``[H]`` on the device.

        One, ``[1]``, where the selection spreads a budget over the heads by itself.
        """
        measured = measure_at(ctx, names, scores, backend=self.backend)
        if measured is None:
            return None
        error, output = measured
        if not chooses_by_head(ctx.method.select):
            error, output = error.sum(1, keepdim=True), output.sum(0, keepdim=True)
        tiny = torch.finfo(torch.float32).tiny
        relative, weight = error / output.clamp(min=tiny), output / output.sum().clamp(min=tiny)
        shares = allot_error(refine(DENSITIES, relative), weight, self.error_at(ctx))
        # What is not finite was found to be so by the plan's own check; every block is kept then.
        return torch.where(torch.isfinite(error.sum()), shares, torch.ones_like(shares))

    def __repr__(self) -> str:
        return f"ErrorControl({self.error:g})"
