"""Plans that follow from the geometry alone: neighbourhoods in the sense of NATTEN."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dit_accel.geometry import TokenGeometry
from dit_accel.mask import BlockMask
from dit_accel.method import Method
from dit_accel.plan import Plan
from dit_accel.windows import WindowSpec, token_windows, visible_fraction, window_for_density, window_levels
from dit_accel_kernels.types import TokenOrder, TokenWindows

__all__ = ["window_plan"]

_BISECTIONS = 7


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
        spec = WindowSpec(method.window, method.stride, method.dilation, method.causal)
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


def _fitted_spec(method: Method, window: tuple[int, int, int]) -> WindowSpec:
    """The spec of a window that was found, not given: a scalar stride is cut to it."""
    stride = method.stride
    if not isinstance(stride, tuple):
        stride = tuple(min(stride, size) for size in window)
    return WindowSpec(window, stride, method.dilation, method.causal)


def _nearest(
    method: Method, geometry: TokenGeometry, index: Tensor | None, density: float
) -> tuple[WindowSpec, Tensor]:
    """The equal-share window whose visited blocks come nearest to ``density``.

    Visited blocks are what a kernel computes; on small grids they are far more than visible pairs.
    """
    least = visible_fraction(geometry, WindowSpec(1))
    low, high = least, 1.0
    best: tuple[float, WindowSpec, Tensor] | None = None
    for bisection in range(_BISECTIONS):
        wanted = (low + high) / 2 if bisection else least
        spec = _fitted_spec(method, window_for_density(geometry, wanted))
        levels = window_levels(geometry, spec, index, method.block_q, method.block_k)
        visited = (levels > 0).float().mean().item()
        distance = abs(math.log(visited / density))
        if best is None or distance < best[0]:
            best = distance, spec, levels
        if visited <= density:
            low = max(low, wanted)
        else:
            high = wanted
    assert best is not None
    return best[1], best[2]
