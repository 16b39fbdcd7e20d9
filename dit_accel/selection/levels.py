"""Levels of a pyramid: the more a block matters, the finer its keys (Pyramid Sparse Attention, arXiv 2512.04025).

A block is exact, enters as means of 2, 4 or 8 tokens, or is skipped. Bounds are given for the fractions at which each
level ends: of the blocks of a row by rank, or of their summed score. A density is met by scaling all bounds alike, up to
the whole row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.selection._registry import SELECTIONS, Forced, Rule

__all__ = ["levels_from_bounds"]

_LEVELS = (1, 2, 4, 8)


def _checked(bounds: tuple[float, float, float, float]) -> tuple[float, ...]:
    ok = all(isinstance(b, int | float) and 0 <= b <= 1 for b in bounds) and list(bounds) == sorted(bounds)
    if not ok or bounds[0] <= 0:
        raise ValueError(f"bounds of levels must rise from above 0 to at most 1, got {bounds}")
    return tuple(float(b) for b in bounds)


def levels_from_bounds(place: Tensor, bounds: tuple[float, ...], factor: Tensor | float) -> Tensor:
    """Levels by place: the first level whose bound, times ``factor``, the place lies below.

    Args:
        place: float32 ``[..., Kb]`` in [0, 1): share of the row, by rank or score, that lies before each block.
        bounds: rising ends of the levels 1, 2, 4 and 8.
        factor: multiplies the bounds, which stop at 1.

    Returns:
        uint8 levels, 0 beyond the last bound.
    """
    levels = torch.zeros(place.shape, dtype=torch.uint8, device=place.device)
    for level, bound in zip(reversed(_LEVELS), reversed(bounds), strict=True):
        levels = torch.where(place < bound * factor, level, levels)
    return levels.to(torch.uint8)


def _rule(place: Tensor, best: Tensor, bounds: tuple[float, ...]) -> Rule:
    def keep(strength: Tensor) -> Tensor:
        return levels_from_bounds(place, bounds, strength).masked_fill(best, 1)

    return Rule(keep, low=0.0, high=1 / bounds[0], strength=1.0)


def _ranks(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Rank of each block in its row, best first, and the order that it comes from."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    positions = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, positions), order


@SELECTIONS.register("levels_rank", paper="arXiv 2512.04025", levels=True)
def levels_rank(
    scores: Tensor, forced: Forced, one: float = 0.1, two: float = 0.15, four: float = 0.15, eight: float = 0.35
) -> Rule:
    """Levels by rank: ``one`` is the fraction of exact blocks of a row, ``two`` where the level of 2 ends, and so on."""
    rank, _ = _ranks(scores)
    return _rule(rank.float() / scores.shape[-1], rank == 0, _checked((one, two, four, eight)))


@SELECTIONS.register("levels_energy", paper="arXiv 2512.04025", levels=True, needs_mass=True)
def levels_energy(
    scores: Tensor, forced: Forced, one: float = 0.4, two: float = 0.5, four: float = 0.6, eight: float = 0.8
) -> Rule:
    """Levels by summed score: exact until ``one`` of the row's score is reached, level 2 until ``two``, and so on."""
    rank, order = _ranks(scores)
    ranked = scores.gather(-1, order).clamp(min=0)
    total = ranked.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    before = (ranked.cumsum(-1) - ranked) / total
    place = torch.empty_like(before).scatter_(-1, order, before.clamp(max=1 - 1e-6))
    return _rule(place, rank == 0, _checked((one, two, four, eight)))
