"""The registry of selection rules, and what a rule is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_accel._specs import Registry

__all__ = ["SELECTIONS", "Forced", "Rule"]


@dataclass(frozen=True)
class Forced:
    """Blocks that are exact whatever their score.

    Attributes:
        rows: bool ``[Qb]``, query blocks that see every key (text queries).
        cols: bool ``[Kb]``, key blocks that every query sees (text keys).
        row_count: number of true ``rows``, known on the host.
        col_count: number of true ``cols``, known on the host.
        row_size: float32 ``[Qb]``, share of the query tokens in each block, or ``None`` for equal blocks.
        col_size: float32 ``[Kb]``, share of the key tokens in each block.
    """

    rows: Tensor
    cols: Tensor
    row_count: int
    col_count: int
    row_size: Tensor | None = None
    col_size: Tensor | None = None

    @classmethod
    def of(
        cls, rows: Tensor, cols: Tensor, device: torch.device | str, *, sizes: tuple[Tensor, Tensor] | None = None
    ) -> Forced:
        """Move host-side flags, and the shares of tokens in blocks, to ``device``; counting comes before the copy."""
        moved = (None, None) if sizes is None else tuple(size.to(device) for size in sizes)
        return cls(rows.to(device), cols.to(device), int(rows.sum()), int(cols.sum()), *moved)


@dataclass(frozen=True, eq=False)
class Rule:
    """A selection rule at work on one tensor of scores.

    Attributes:
        keep: ``strength -> uint8 levels [B, H, Qb, Kb]`` (0 skip, 1 exact, 2 4 8 pooled), keeping more the nearer the
            strength comes to ``high``. At least one block of each row is exact. The strength is a 0-dim float32 tensor on
            the device, or with ``is_density`` a number.
        low: strength that keeps least.
        high: strength that keeps most; may be below ``low``.
        strength: the rule's own parameter, from its spec; ``None`` where it was not given.
        is_density: whether the strength is the density itself, so that no search is needed.
        bound: ``density -> int``, most blocks that are kept, where the host knows; only with ``is_density``.
    """

    keep: Callable[[Any], Tensor]
    low: float | Tensor = 0.0
    high: float | Tensor = 1.0
    strength: float | None = None
    is_density: bool = False
    bound: Callable[[float], int] | None = None


SELECTIONS: Registry[Rule] = Registry("select")
"""Rules ``(scores, forced, *values) -> Rule`` with scores float32 ``[B, H, Qb, Kb]``, finite but for forced columns, which
hold infinity. The first value of a spec is the strength (``"top_p:0.9"``); without it a density decides.

Traits: ``needs_mass`` (bool): forced columns keep their scores, since the rule adds scores up; ``levels`` (bool): it may
give levels of a pyramid; ``may_be_empty`` (bool): rows that it and the forced blocks leave empty get their best block;
``by_head`` (bool): heads do not look at each other, and a strength of shape ``[1, H, 1, 1]`` will do; ``keeps_best``
(``"row"``, ``"head"`` or ``"layer"``): it keeps the share of the best blocks of each, which one kernel does."""
