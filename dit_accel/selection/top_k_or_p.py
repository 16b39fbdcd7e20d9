"""At least so many blocks, and at least so much mass (Jenga, arXiv 2505.16864)."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.selection._registry import SELECTIONS, Forced, Rule

_SHARE = 0.25


@SELECTIONS.register("top_k_or_p", paper="arXiv 2505.16864", needs_mass=True)
def top_k_or_p(scores: Tensor, forced: Forced, share: float | None = None, mass: float = 0.3) -> Rule:
    """The best blocks of each row: ``share`` of them, or as many as hold ``mass``, whichever is more.

    Where a density is asked for, both shrink or grow together, in the proportion of ``mass`` to ``share`` (0.25 if that is
    not given).
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    ranked = scores.gather(-1, order).clamp(min=0)
    before = ranked.cumsum(-1) - ranked
    total = ranked.sum(-1, keepdim=True)
    place = torch.arange(scores.shape[-1], device=scores.device)
    ratio = mass / (_SHARE if share is None else share)

    def keep(strength: Tensor) -> Tensor:
        kept = (place < (strength * scores.shape[-1]).round()) | (before < (strength * ratio).clamp(max=1) * total)
        kept[..., 0] = True
        return torch.zeros_like(kept, dtype=torch.uint8).scatter_(-1, order, kept.to(torch.uint8))

    return Rule(keep, strength=share)
