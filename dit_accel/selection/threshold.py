"""All blocks whose score reaches a threshold."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.selection._ranked import with_best
from dit_accel.selection._registry import SELECTIONS, Forced, Rule


@SELECTIONS.register("threshold", by_head=True)
def threshold(scores: Tensor, forced: Forced, least: float | None = None) -> Rule:
    """Blocks with a score of at least ``least``, and the best of each row."""

    def keep(strength: Tensor) -> Tensor:
        return with_best(scores >= strength, scores).to(torch.uint8)

    finite = scores.where(torch.isfinite(scores), 0)
    return Rule(keep, low=finite.amax(), high=finite.amin(), strength=least)
