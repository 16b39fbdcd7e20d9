"""Plans that follow from the geometry alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dit_accel.choice._registry import fixed_order
from dit_accel.compensate import make_compensation
from dit_accel.mask import PARTIAL, BlockMask
from dit_accel.pattern import Pattern, PatternContext, make_pattern
from dit_accel.plan import Plan
from dit_accel_kernels.types import TokenWindows

if TYPE_CHECKING:
    from dit_accel.selection import Forced

__all__ = ["on_device", "pattern_plan", "with_forced"]


def with_forced(levels: Tensor, forced: Forced) -> Tensor:
    """Levels with the forced rows and columns exact; partial blocks stay partial, since extra tokens are seen in them."""
    whole = forced.cols.cpu() | forced.rows.cpu()[:, None]
    return torch.where(whole & (levels != PARTIAL), torch.ones_like(levels), levels)


def on_device(windows: TokenWindows | None, device: torch.device) -> TokenWindows | None:
    """Token windows on ``device``."""
    if windows is None:
        return None
    return TokenWindows(windows.q_lo.to(device), windows.q_hi.to(device), windows.k_code.to(device))


def pattern_plan(
    ctx: PatternContext, names: tuple[str, ...], table: Tensor | None, forced: Forced, device: torch.device
) -> Plan:
    """The plan of a pattern in one order, for all layers and heads.

    Args:
        ctx: what the pattern follows from.
        names: name of the token order.
        table: int32 ``[1, S]`` the token order, or ``None``.
        forced: blocks with extra tokens.
        device: where the plan goes.

    Raises:
        ValueError: without a grid that the pattern needs, or if it does not fit the grid.
    """
    made: Pattern = make_pattern(ctx)
    tokens = ctx.geometry.tokens
    levels = with_forced(made.levels, forced).to(device)
    mask = BlockMask.from_levels(levels, tokens, tokens, ctx.block_q, ctx.block_k, partial=made.windows is not None)
    order = None if table is None else fixed_order(table, ctx.heads)
    return Plan(
        mask=mask,
        order=order,
        key_order=order,
        order_names=names,
        windows=on_device(made.windows, device),
        compensation=make_compensation(ctx.method.compensate),
        density=mask.density(),
        cost=0.0,
        precision=ctx.method.precision_rule.fixed,
    )
