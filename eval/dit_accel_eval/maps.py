"""Pictures of attention maps: as the model orders its tokens, as a method orders them, and the blocks that it keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dit_accel_eval.attention import recalled_mass
from dit_accel_eval.files import replacing

__all__ = ["HeadMaps", "draw_maps", "evenly_ranked"]


@dataclass(frozen=True, eq=False)
class HeadMaps:
    """Maps of one head, each ``[Qb, Kb]`` on the CPU; rows of a mass sum to 1.

    Attributes:
        layer: layer index.
        head: head index.
        order: name of the token order.
        raster: softmax mass of each block in the model's own order.
        ordered: softmax mass of each block in the method's order.
        kept: bool, blocks that the method computes.
    """

    layer: int
    head: int
    order: str
    raster: Tensor
    ordered: Tensor
    kept: Tensor

    @property
    def density(self) -> float:
        """Share of blocks that are kept."""
        return float(self.kept.float().mean())

    @property
    def recall(self) -> float:
        """Share of the softmax mass in kept blocks."""
        return float(recalled_mass(self.ordered, self.kept))

    @property
    def raster_recall(self) -> float:
        """Mass that as many blocks a row, the best ones, would keep in the model's own order."""
        counts = self.kept.sum(-1, keepdim=True)
        best = self.raster.float().sort(-1, descending=True).values.cumsum(-1)
        return float(best.gather(-1, (counts.long() - 1).clamp(min=0)).mean())

    def to_dict(self) -> dict[str, Any]:
        """Numbers of the maps as plain JSON types."""
        return {
            "layer": self.layer,
            "head": self.head,
            "order": self.order,
            "density": self.density,
            "kept_mass": self.recall,
            "kept_mass_in_raster_order": self.raster_recall,
        }


def evenly_ranked(maps: Sequence[HeadMaps], count: int) -> list[HeadMaps]:
    """Pick ``count`` heads evenly spread from the most to the least kept mass, so that the worst is among them."""
    ranked = sorted(maps, key=lambda m: -m.recall)
    if len(ranked) <= count:
        return ranked
    return [ranked[round(i)] for i in np.linspace(0, len(ranked) - 1, count)]


def draw_maps(path: str | Path, maps: Sequence[HeadMaps], title: str = "") -> None:
    """Draw one row a head: mass in raster order, mass in the method's order, the blocks kept.

    Args:
        path: file to write, ``.png`` or another suffix that matplotlib knows.
        maps: heads to draw.
        title: headline.

    Raises:
        ValueError: no heads.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    if not maps:
        raise ValueError("there must be at least one head to draw, got none")
    figure = Figure(figsize=(9.6, 0.7 + 3.1 * len(maps)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(maps), 3, squeeze=False)
    if title:
        figure.suptitle(title, fontsize=11)
    for row, one in zip(axes, maps, strict=True):
        even = 1.0 / one.raster.shape[-1]
        norm = LogNorm(even / 30, max(float(one.ordered.max()), float(one.raster.max()), even * 2))
        kept = np.where(one.kept.numpy() != 0, one.ordered.float().numpy().clip(min=even / 30), np.nan)
        pictures = (
            (one.raster, f"layer {one.layer}, head {one.head}: the model's order"),
            (one.ordered, f"order {one.order}"),
            (kept, f"kept: {one.density:.0%} of blocks, {one.recall:.0%} of mass"),
        )
        for axis, (picture, label) in zip(row, pictures, strict=True):
            data = np.asarray(picture, np.float32)
            axis.set_facecolor("#d8d8d8")
            image = axis.imshow(data.clip(min=even / 30), norm=norm, cmap="magma", interpolation="nearest")
            axis.set_title(label, fontsize=8.5)
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel("query block", fontsize=8)
        row[0].set_xlabel("key block", fontsize=8)
        figure.colorbar(image, ax=list(row), shrink=0.8, label="softmax mass of a block")
    with replacing(path) as temporary:
        figure.savefig(temporary)
