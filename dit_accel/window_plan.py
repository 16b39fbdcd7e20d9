"""Plans that follow from the geometry alone: neighbourhoods in the sense of NATTEN."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dit_accel.geometry import TokenGeometry
from dit_accel.mask import BlockMask
from dit_accel.method import Method
from dit_accel.plan import Plan
from dit_accel.windows import WindowSpec, token_windows, window_levels, windows_by_share
from dit_accel_kernels.types import TokenOrder, TokenWindows

__all__ = ["window_plan"]


def window_plan(
    method: Method,
    geometry: TokenGeometry,
    names: tuple[str, ...],
    table: Tensor | None,
    device: torch.device,
    density: float,
    heads: int,
) -> Plan:
    """Neighbourhood attention as a plan (arXiv 2204.07143, 2209.15001, 2504.16922).

    Args:
        method: its window, stride, dilation and causality.
        geometry: a grid with optional extra tokens, which everybody sees and which see everything.
        names: name of the token order.
        table: int32 ``[1, S]`` the token order, or ``None``.
        device: where the plan goes.
        density: share of blocks to visit, where the method gives no window; the nearest there is.
        heads: attention heads, which share the window.

    Raises:
        ValueError: without a grid, or if the window does not fit it.
    """
    if geometry.grid is None:
        raise ValueError(f"method {method.name!r} needs frames, height and width, got {geometry}")
    index = None if table is None else table[0].cpu()
    if method.window is not None:
        spec = _spec(method, method.window)
        levels = window_levels(geometry, spec, index, method.block_q, method.block_k)
    else:
        spec, levels = _nearest(method, geometry, index, density)
    tokens = geometry.tokens
    windows = token_windows(geometry, spec, index)
    order = None
    if table is not None:
        order = TokenOrder(table, torch.zeros(heads, dtype=torch.int32, device=device))
    mask = BlockMask.from_levels(levels.to(device), tokens, tokens, method.block_q, method.block_k, partial=True)
    return Plan(
        mask=mask,
        order=order,
        order_names=names,
        windows=TokenWindows(windows.q_lo.to(device), windows.q_hi.to(device), windows.k_code.to(device)),
        compensate=False,
        density=mask.density(),
        cost=0.0,
    )


def _spec(method: Method, window: int | tuple[int, ...]) -> WindowSpec:
    """The neighbourhood of a window; a scalar stride is cut to it on axes where it is longer."""
    stride = method.stride
    if not isinstance(stride, tuple) and isinstance(window, tuple):
        stride = tuple(stride if size < 1 else min(stride, size) for size in window)
    elif not isinstance(stride, tuple) and isinstance(window, int) and window > 0:
        stride = min(stride, window)
    return WindowSpec(window, stride, method.dilation, method.causal)


def _nearest(
    method: Method, geometry: TokenGeometry, index: Tensor | None, density: float
) -> tuple[WindowSpec, Tensor]:
    """The equal-share window whose visited blocks come nearest to ``density``; of several, the one that sees most.

    Visited blocks are what a kernel computes; on small grids they are far more than visible pairs. A window that is one
    token wide on every axis longer than that is no neighbourhood and is not offered. Density 1 is the whole grid.
    """
    axes = geometry.axes
    offered = [w for w in windows_by_share(geometry) if all(size >= min(3, n) for size, n in zip(w, axes, strict=True))]

    def visit(place: int) -> tuple[float, WindowSpec, Tensor]:
        spec = _spec(method, offered[place])
        levels = window_levels(geometry, spec, index, method.block_q, method.block_k)
        return (levels > 0).float().mean().item(), spec, levels

    low, high = 0, len(offered) - 1
    if density >= 1:
        return visit(high)[1:]
    while low < high:  # the last window that stays within the density
        middle = (low + high + 1) // 2
        low, high = (middle, high) if visit(middle)[0] <= density else (low, middle - 1)
    best = visit(low)
    for place in range(low + 1, len(offered)):  # the next larger visit, and all windows that visit no more than it
        tried = visit(place)
        if abs(math.log(tried[0] / density)) > abs(math.log(best[0] / density)):
            break
        best = tried
    return best[1:]
