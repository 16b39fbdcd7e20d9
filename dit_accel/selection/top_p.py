"""The fewest blocks of each row that together hold a share of its mass."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.selection._registry import SELECTIONS, Forced, Rule


@SELECTIONS.register("top_p", needs_mass=True, by_head=True)
def top_p(scores: Tensor, forced: Forced, share: float | None = None) -> Rule:
    """The best blocks of each row until they hold ``share`` of its mass, the one that crosses it included."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    ranked = scores.gather(-1, order).clamp(min=0)
    before = ranked.cumsum(-1) - ranked
    total = ranked.sum(-1, keepdim=True)

    def keep(strength: Tensor) -> Tensor:
        kept = (before < strength * total) | (strength >= 1)
        kept[..., 0] = True
        return torch.zeros_like(kept, dtype=torch.uint8).scatter_(-1, order, kept.to(torch.uint8))

    return Rule(keep, strength=share)
