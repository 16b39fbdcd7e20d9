"""Windows per head, found offline: which of a pattern's candidates keeps most softmax mass (arXiv 2502.04507)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dit_accel._specs import parse_spec
from dit_accel.geometry import TokenGeometry
from dit_accel.order import extra_blocks
from dit_accel.pattern import PATTERNS, PatternContext
from dit_accel.pattern_plan import with_forced
from dit_accel.selection import Forced

if TYPE_CHECKING:
    from dit_accel.planner import Planner

__all__ = ["candidate_levels", "window_recall"]


def candidate_levels(planner: Planner, geometry: TokenGeometry, heads: int) -> Tensor:
    """Levels of the candidates of the planner's pattern, blocks of extra tokens included.

    Args:
        planner: of a method whose pattern has the trait ``candidates``.
        geometry: where the tokens sit.
        heads: attention heads.

    Returns:
        uint8 ``[N, Qb, Kb]`` on the CPU.

    Raises:
        ValueError: a candidate has token windows, which cannot differ by head.
    """
    method, cpu = planner.method, torch.device("cpu")
    table = planner.layout(geometry, cpu).table
    index = None if table is None else table[0]
    ctx = PatternContext(method, geometry, index, method.density_at(0.0), heads)
    spec = parse_spec(method.score)
    made = PATTERNS.trait(spec, "candidates")(ctx, *spec.args, **spec.kwargs)
    if any(pattern.windows is not None for pattern in made):
        raise ValueError(f"candidates of pattern {method.score!r} have token windows, which cannot differ by head")
    rows = extra_blocks(geometry, index is None, method.block_q)
    columns = extra_blocks(geometry, index is None, method.block_k)
    forced = Forced.of(rows, columns, cpu)
    return torch.cat([with_forced(pattern.levels, forced)[0] for pattern in made])


def window_recall(mass: Tensor, levels: Tensor) -> Tensor:
    """Softmax mass that each candidate keeps, as a share: float32 ``[N, H]``.

    The paper compares outputs, by their mean squared error; the mass needs one dense pass for all candidates, and what a
    window loses of it bounds the error.

    Args:
        mass: float32 ``[H, Qb, Kb]`` softmax mass of each block, of any scale.
        levels: uint8 ``[N, Qb, Kb]``.
    """
    kept = torch.stack([(mass * (one > 0)).sum((1, 2)) for one in levels])
    return kept / mass.sum((1, 2)).clamp(min=1e-12)
