"""Selection: from block scores to levels, on the device, without a host synchronisation.

Each rule stands in a file of this folder and registers itself in :data:`SELECTIONS`. A rule has a strength of its own
(a share of mass, a threshold); where a density is asked for instead, the strength that meets it is searched on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dit_accel._discover import import_all
from dit_accel.selection._ranked import budget, with_best
from dit_accel.selection._registry import SELECTIONS, Forced, Rule
from dit_accel_kernels.select import keep_best

__all__ = ["SELECTIONS", "Forced", "Rule", "level_share", "select"]

import_all(__name__, __path__)

_SEARCH_STEPS = 20
_ROUNDING = 1e-5


def level_share(levels: Tensor, forced: Forced | None = None, parts: int = 1) -> Tensor:
    """Work of levels over the work of all blocks, a float32 tensor: a block of level ``n`` costs ``1/n``.

    Args:
        levels: uint8 ``[B, H, Qb, Kb]``.
        forced: where it knows the sizes of blocks, a ragged last one counts by its tokens.
        parts: into how many equal groups of heads to divide the only batch element.

    Returns:
        The share, 0-dim, or with several ``parts`` that of each, ``[parts]``.
    """
    work = torch.where(levels > 0, 1 / levels.float().clamp(min=1), 0.0)
    if forced is None or forced.row_size is None or forced.col_size is None:
        by_head = work.flatten(2).mean(-1)
    else:
        by_head = (work @ forced.col_size) @ forced.row_size
    return by_head.mean() if parts == 1 else by_head.view(parts, -1).mean(-1)


def select(
    rule: str,
    scores: Tensor,
    density: float | None,
    forced: Forced,
    *,
    insist: Tensor | None = None,
    parts: int = 1,
) -> tuple[Tensor, int | None]:
    """Choose blocks.

    Forced columns take part of each row's budget; forced rows come on top.

    Args:
        rule: spec of a rule in :data:`SELECTIONS`.
        scores: float32 ``[B, H, Qb, Kb]``. Values that are not finite count as the least.
        density: share of the map to compute; ``None`` leaves it to the rule's own strength.
        forced: blocks that are exact whatever their score.
        insist: bool ``[B|1, H|1, Qb, Kb]``, further blocks that are exact.
        parts: groups of heads of the only batch element, each of which meets the density by itself; for rules with the
            trait ``by_head``.

    Returns:
        uint8 levels ``[B, H, Qb, Kb]``, and an upper bound of the chosen blocks if the host knows one.

    Raises:
        ValueError: neither a density nor a strength is given.
    """
    if insist is None and (kept := _keep_best(rule, scores, density, forced)) is not None:
        return kept
    scores = torch.nan_to_num(scores, nan=0.0, posinf=0.0, neginf=0.0)
    if not SELECTIONS.trait(rule, "needs_mass", False):
        scores = scores.masked_fill(forced.cols, math.inf)
    made = SELECTIONS.create(rule, scores, forced)
    whole = forced.cols | forced.rows[:, None]
    if insist is not None:
        whole = whole | insist

    def keep(strength: Tensor | float) -> Tensor:
        if isinstance(strength, Tensor) and strength.ndim:  # one for each part
            strength = strength.repeat_interleave(scores.shape[1] // parts)[None, :, None, None]
        return made.keep(strength).masked_fill(whole, 1)

    if density is None:
        if made.strength is None:
            raise ValueError(f"selection {rule!r} needs a density, or a strength of its own such as '{rule}:0.9'")
        levels = keep(made.strength if made.is_density else _scalar(made.strength, scores.device))
        known = made.bound(made.strength) if made.is_density and made.bound is not None else None
    elif made.is_density:
        levels = keep(density)
        known = made.bound(density) if made.bound is not None else None
    else:
        levels, known = _meet(made, keep, density, forced, scores.device, parts), None
    if SELECTIONS.trait(rule, "may_be_empty", False):
        levels = torch.where((levels > 0).any(-1, keepdim=True), levels, with_best(levels > 0, scores).to(torch.uint8))
    return levels, _with_forced(known, levels, forced, insist)


def _keep_best(rule: str, scores: Tensor, density: float | None, forced: Forced) -> tuple[Tensor, int | None] | None:
    """What :func:`select` does, in few launches, for rules that keep a number of blocks of a row, a head or a layer."""
    group = SELECTIONS.trait(rule, "keeps_best", None)
    if group is None:
        return None
    made = SELECTIONS.create(rule, scores, forced)
    share = made.strength if density is None else density
    if share is None or made.bound is None:
        return None
    rows, map_of = forced.rows, scores
    if group == "layer":  # its heads are one, of all their rows
        rows, map_of = rows.repeat(scores.shape[1]), scores.flatten(1, 2)[:, None]
    levels = keep_best(
        map_of,
        budget(share, map_of.shape[3] * (1 if group == "row" else map_of.shape[2])),
        by_head=group != "row",
        rows=rows if forced.row_count else None,
        cols=forced.cols if forced.col_count else None,
    ).view_as(scores)
    return levels, _with_forced(made.bound(share), levels, forced, None)


def _with_forced(bound: int | None, levels: Tensor, forced: Forced, insist: Tensor | None) -> int | None:
    if bound is None or insist is not None:
        return None
    batch, heads, rows, cols = levels.shape
    return min(bound + batch * heads * (rows * forced.col_count + cols * forced.row_count), levels.numel())


def _scalar(value: float | Tensor, device: torch.device) -> Tensor:
    """A 0-dim float32 tensor made on the device, since a copy from the host would wait."""
    return value if isinstance(value, Tensor) else torch.full((), value, device=device)


def _meet(
    rule: Rule, keep: Callable[[Tensor], Tensor], density: float, forced: Forced, device: torch.device, parts: int
) -> Tensor:
    """Levels at the strength whose share comes nearest to ``density`` from below, by bisection on the device."""
    low, high = _scalar(rule.low, device), _scalar(rule.high, device)
    most = high
    for _ in range(_SEARCH_STEPS):
        middle = (low + high) / 2
        fits = level_share(keep(middle), forced, parts) <= density
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    return keep(torch.where(level_share(keep(most), forced, parts) <= density + _ROUNDING, most, low))
