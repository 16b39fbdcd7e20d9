"""No scores: for methods that keep everything, or only what is forced."""

from __future__ import annotations

import torch

from dit_accel.context import PlanContext
from dit_accel.score._registry import SCORES, Scores


@SCORES.register("none", cost=0.0)
def none(ctx: PlanContext) -> Scores:
    """Zero for every block."""
    return Scores(torch.zeros(1, 1, ctx.q_blocks, ctx.k_blocks, device=ctx.query.device))
