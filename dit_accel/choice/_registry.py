"""The registry of choices, and the rows that they look at."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel._specs import Registry
from dit_accel_kernels.types import TokenOrder

__all__ = ["CHOICES", "SAMPLED_ROWS", "fixed_order", "kept_blocks", "sampled_count", "sampled_rows"]

CHOICES: Registry[Tensor] = Registry("order_choice")
"""Rules ``(ctx, table, *values) -> int64 [H]`` with ``table`` int32 ``[N, S]``, the candidate orders.

Traits: ``scores``: ``(ctx, table) -> float32 [N, H]``, which calibration sums over runs; ``needs_lse`` (bool); ``static``
(bool), for calibrated methods only; ``cost``: ``(method, geometry, candidates) -> float``, work in dense attentions."""

#: Most query blocks looked at when a head chooses its order; shorter sequences look at a sixteenth.
SAMPLED_ROWS = 16


#: Density by which orders are compared where the method leaves it to its selection.
_DEFAULT_DENSITY = 0.25


def kept_blocks(density: float | None, blocks: int) -> int:
    """How many of ``blocks`` key blocks a row is taken to keep while orders are compared, at least one."""
    return max(round((_DEFAULT_DENSITY if density is None else density) * blocks), 1)


def fixed_order(table: Tensor, heads: int) -> TokenOrder:
    """The order in which every head uses the one row of ``table``."""
    return TokenOrder(table, torch.zeros(heads, dtype=torch.int32, device=table.device))


def sampled_count(blocks: int) -> int:
    """How many of ``blocks`` query blocks are looked at when a head chooses its order."""
    return min(SAMPLED_ROWS, max(4, blocks // 16), blocks)


def sampled_rows(blocks: int, device: torch.device) -> Tensor:
    """Evenly spread query blocks, int32 ``[sampled_count(blocks)]``."""
    count = sampled_count(blocks)
    # The i-th is in the middle of its part: (i + 1/2) * blocks / count, rounded down.
    centres = torch.arange(blocks, 2 * blocks * count, 2 * blocks, device=device, dtype=torch.int32)
    return centres.floor_divide_(2 * count)
