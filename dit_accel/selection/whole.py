"""Everything, or only what is forced and what a score rule insists on."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.selection._registry import SELECTIONS, Forced, Rule


@SELECTIONS.register("all")
def whole(scores: Tensor, forced: Forced) -> Rule:
    """Every block."""
    levels = torch.ones_like(scores, dtype=torch.uint8)
    return Rule(lambda strength: levels, strength=1.0, is_density=True, bound=lambda density: levels.numel())


@SELECTIONS.register("insisted", may_be_empty=True)
def insisted(scores: Tensor, forced: Forced) -> Rule:
    """Only forced blocks and those that the score rule insists on; the best of a row where these are none."""
    levels = torch.zeros_like(scores, dtype=torch.uint8)
    return Rule(lambda strength: levels, strength=1.0, is_density=True)
