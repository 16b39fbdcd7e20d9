"""There is one order, or the layers take turns."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.choice._registry import CHOICES
from dit_accel.context import PlanContext


@CHOICES.register("fixed")
def fixed(ctx: PlanContext, table: Tensor) -> Tensor:
    """The first candidate for every head."""
    return torch.zeros(ctx.query.shape[1], dtype=torch.int64, device=table.device)


@CHOICES.register("by_layer", paper="arXiv 2506.23858")
def by_layer(ctx: PlanContext, table: Tensor) -> Tensor:
    """Layer ``i`` takes candidate ``i mod N``, for every head (VMoBA's layer-recurrent partition)."""
    place = ctx.layer % table.shape[0]
    return torch.full((ctx.query.shape[1],), place, dtype=torch.int64, device=table.device)
