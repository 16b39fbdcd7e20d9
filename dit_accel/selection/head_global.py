"""One budget for all query blocks of a head (VMoBA, arXiv 2506.23858)."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.selection._ranked import with_best
from dit_accel.selection._registry import SELECTIONS, Forced, Rule


@SELECTIONS.register("head_global", paper="arXiv 2506.23858", needs_mass=True)
def head_global(scores: Tensor, forced: Forced, share: float | None = None) -> Rule:
    """The fewest blocks of a head that hold ``share`` of all its gates, each row's best among them.

    The gates of a head are mapped to 0 to 1 by their least and largest value before they are added up. The block that
    crosses the share is kept.
    """
    flat = scores.flatten(2)
    low, high = flat.amin(-1, keepdim=True), flat.amax(-1, keepdim=True)
    gates = (flat - low) / (high - low).clamp(min=1e-20)
    ranked, order = gates.sort(dim=-1, descending=True, stable=True)
    sums = ranked.cumsum(-1, dtype=torch.float64)  # a head may have a million blocks
    positions = torch.arange(flat.shape[-1], device=flat.device, dtype=torch.int32)
    rank = torch.empty_like(order, dtype=torch.int32).scatter_(-1, order, positions.expand_as(flat))

    def keep(strength: Tensor) -> Tensor:
        # The least gate counts 0: without the second term it would be skipped even where everything is asked for.
        inside = ((sums - ranked) < strength * sums[..., -1:]) | (strength >= 1)
        count = inside.sum(-1, keepdim=True)
        return with_best((rank < count).view_as(scores), scores).to(torch.uint8)

    return Rule(keep, strength=share)
