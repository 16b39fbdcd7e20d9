"""Using a profile on a run that differs from the one it was made on: another grid, another model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from dit_accel.context import PlanContext
from dit_accel.geometry import TokenGeometry
from dit_accel.method import Method
from dit_accel.order import extra_blocks
from dit_accel.profiles.fingerprint import fingerprint
from dit_accel.profiles.profile import ComponentProfile, Profile
from dit_accel.score import Scores
from dit_accel_kernels.types import TokenOrder

if TYPE_CHECKING:
    from dit_accel.planner import Planner

__all__ = ["Fitted", "ProfileControl", "check_models", "fit"]


class Fitted(NamedTuple):
    """Densities for a geometry, float32 ``[P, L, H]`` by branch, and what was done to get them."""

    density: Mapping[str, Tensor]
    notes: list[str]


def fit(part: ComponentProfile, geometry: TokenGeometry, method: Method) -> Fitted:
    """Densities of a component on another grid.

    They carry over as shares of the map. A share too small for the blocks that every row keeps (text and one more) is
    raised to it. Nothing is scaled by length: how much of a longer sequence a head needs is for a calibration to say.
    """
    if geometry == part.geometry:
        return Fitted(part.density, [])
    blocks = -(-geometry.tokens // method.block_k)
    forced = int(extra_blocks(geometry, method.order == ("raster",), method.block_k).sum())
    least = min((forced + 1) / blocks, 1.0)
    fitted = {branch: density.clamp(min=least) for branch, density in part.density.items()}
    raised = sum(int((density < least).sum()) for density in part.density.values())
    total = sum(density.numel() for density in part.density.values())
    notes = [f"the profile was made on {part.geometry}, this run has {geometry}: densities carry over"]
    if raised:
        notes[0] += f", {raised} of {total} raised to {least:.3f}, the least that a row keeps here"
    return Fitted(fitted, notes)


def check_models(profile: Profile, modules: Mapping[str, nn.Module]) -> list[str]:
    """Refuse a pipeline that the profile was not made for.

    Returns:
        What differs without being a reason to refuse.

    Raises:
        ValueError: other transformers, or transformers of another class.
    """
    if set(profile.components) != set(modules):
        raise ValueError(
            f"the profile is for {', '.join(sorted(profile.components))}, this pipeline has {', '.join(sorted(modules))}"
        )
    warnings = []
    for name, module in modules.items():
        part, found = profile.components[name], type(module).__name__
        if part.model != found:
            raise ValueError(f"the profile was made for {part.model}, {name} is a {found}; calibrate this model")
        differs = part.fingerprint.differs(fingerprint(module))
        if differs is not None:
            warnings.append(
                f"the profile was made for another {part.model} than {name} ({differs}): its densities may not fit; "
                "calibrate this model"
            )
    return warnings


class ProfileControl:
    """Gives each head the density that a profile holds for its part of the run.

    Args:
        part: of the transformer.
        method: that plans are made with.
    """

    def __init__(self, part: ComponentProfile, method: Method) -> None:
        self.part, self.method = part, method
        self._density: Mapping[str, Tensor] = part.density

    def join(self, layers: tuple[str, ...]) -> None:
        """Check the layers that were found.

        Raises:
            ValueError: if they are not as many as in the profile.
        """
        if len(layers) != len(self.part.layers):
            raise ValueError(
                f"the profile holds {len(self.part.layers)} attention layers of {self.part.model}, this one has "
                f"{len(layers)}; calibrate this model"
            )

    def begin(self, geometry: TokenGeometry) -> list[str]:
        """Fit the densities to the geometry of the run."""
        self._density, notes = fit(self.part, geometry, self.method)
        return notes

    def shares(self, planner: Planner, ctx: PlanContext, names: tuple[str, ...], scores: Scores) -> Tensor | None:
        """Density of each head, float32 ``[H]`` on the CPU, ``None`` for a branch without densities.

        Raises:
            ValueError: if the layer has another number of heads.
        """
        found = self._density.get(ctx.step.branch, self._density.get("*"))
        if found is None:
            return None
        heads = ctx.query.shape[1]
        if heads != self.part.heads:
            raise ValueError(f"the profile has {self.part.heads} heads in each layer, layer {ctx.layer} has {heads}")
        step = ctx.step
        progress = step.step / step.steps if step.step is not None and step.steps else step.progress or 0.0
        return found[self.part.part(progress), ctx.layer]

    def head_orders(
        self, planner: Planner, geometry: TokenGeometry, layer: int, device: torch.device
    ) -> TokenOrder | None:
        """Orders of the heads of a layer where the profile fixes them and they exist on this grid, else ``None``."""
        if not self.part.orders:
            return None
        layout = planner.layout(geometry, device)
        wanted = self.part.orders[layer]
        if layout.table is None or any(name not in layout.names for name in wanted):
            return None
        index = torch.tensor([layout.names.index(name) for name in wanted], dtype=torch.int32)
        return layout.order(index.to(device, non_blocking=True))
