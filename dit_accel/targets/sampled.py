"""What a selection keeps in a few rows at several densities, at less cost than choosing everything at each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from dit_accel._specs import parse_spec
from dit_accel.selection import Forced, select
from dit_accel.selection._ranked import budget, with_best

__all__ = ["sampled_levels"]

#: Scores of one budget that are sorted to find what reaches it; of more, evenly spread ones stand for all.
_MOST_SORTED = 1 << 18
#: From which axis of ``[B, H, Qb, Kb]`` on blocks share one budget.
_SHARED_FROM = {"top_k_head": 2, "top_k_layer": 1}


def sampled_levels(
    rule: str, scores: Tensor, densities: Sequence[float], forced: Forced, rows: Tensor, insist: Tensor | None = None
) -> list[Tensor]:
    """Levels of some query blocks, as :func:`dit_accel.selection.select` would choose them among all.

    ``top_k`` looks at these rows alone. ``top_k_head`` and ``top_k_layer`` find the score that a budget reaches in one sort
    for all densities; blocks of equal score at that place are all kept. Other rules choose everything each time.

    Args:
        rule: spec of a rule in :data:`dit_accel.selection.SELECTIONS`.
        scores: float32 ``[B, H, Qb, Kb]``.
        densities: rising, above 0 and below 1.
        forced: blocks that are exact whatever their score.
        rows: int64 ``[R]``, query blocks that are not forced.
        insist: bool ``[B|1, H|1, Qb, Kb]``, further blocks that are exact.

    Returns:
        uint8 ``[B, H, R, Kb]`` for each density.
    """
    spec = parse_spec(rule)
    plain = insist is None and not spec.args and not spec.kwargs
    if plain and spec.name == "top_k":
        few = dataclasses.replace(
            forced, rows=torch.zeros_like(rows, dtype=torch.bool), row_count=0, row_size=None, col_size=None
        )
        part = scores.index_select(2, rows)
        return [select(rule, part, density, few)[0] for density in densities]
    if plain and spec.name in _SHARED_FROM:
        return _by_threshold(scores, densities, forced, rows, _SHARED_FROM[spec.name])
    chosen = (select(rule, scores, density, forced, insist=insist)[0] for density in densities)
    return [levels.index_select(2, rows) for levels in chosen]


def _by_threshold(scores: Tensor, densities: Sequence[float], forced: Forced, rows: Tensor, start: int) -> list[Tensor]:
    """Blocks whose score is among the best of all that share a budget."""
    scores = torch.nan_to_num(scores, nan=0.0, posinf=0.0, neginf=0.0).masked_fill(forced.cols, torch.inf)
    flat = scores.flatten(start)
    stride = -(-flat.shape[-1] // _MOST_SORTED)
    ranked = flat[..., ::stride].sort(dim=-1, descending=True).values
    part = scores.index_select(2, rows)
    found = []
    for density in densities:
        least = ranked[..., budget(density, ranked.shape[-1]) - 1]
        kept = part >= least.view(*least.shape, *[1] * (part.ndim - least.ndim))
        found.append((with_best(kept, part) | forced.cols).to(torch.uint8))
    return found
