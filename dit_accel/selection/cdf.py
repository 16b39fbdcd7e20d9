"""The blocks of each row whose sum stays within a share of its mass (SpargeAttn, arXiv 2502.18137)."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.selection._registry import SELECTIONS, Forced, Rule


@SELECTIONS.register("cdf", paper="arXiv 2502.18137", needs_mass=True, by_head=True)
def cdf(scores: Tensor, forced: Forced, share: float | None = None) -> Rule:
    """The best blocks of each row whose sum does not exceed ``share`` of its mass, and at least the best one.

    The block that crosses the share is not kept, which is what tells it from ``top_p``.
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    sums = scores.gather(-1, order).clamp(min=0).cumsum(-1)

    def keep(strength: Tensor) -> Tensor:
        kept = sums <= strength * sums[..., -1:]
        kept[..., 0] = True
        return torch.zeros_like(kept, dtype=torch.uint8).scatter_(-1, order, kept.to(torch.uint8))

    return Rule(keep, strength=share)
