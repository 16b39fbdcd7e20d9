"""Token orders: permutations of the visual tokens that bring together what attends to each other.

An order that changes anything lays the sequence out as visual tokens, prefix, suffix, so that visual blocks start at
position 0 and the tokens that are always exact share the last blocks. An order that changes nothing is ``None``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from dit_accel._specs import Spec, parse_spec
from dit_accel.geometry import TokenGeometry
from dit_accel.order import brick, brick2d, gilbert, morton, raster  # noqa: F401 -- they register themselves
from dit_accel.order.axes import AXIS_ORDERS
from dit_accel.order.registry import ORDERS
from dit_accel_kernels.types import TokenOrder

__all__ = [
    "AXIS_ORDERS",
    "ORDERS",
    "clear_caches",
    "extra_blocks",
    "inverse_index",
    "order_index",
    "token_order",
    "visual_first",
]


def order_index(order: str | Spec, geometry: TokenGeometry) -> Tensor | None:
    """Permutation of a sequence, by the name of an order.

    Args:
        order: name or spec, such as ``"hwf"`` or ``"brick:4x4x4"``; see :data:`ORDERS`.
        geometry: layout of the sequence.

    Returns:
        int32 ``[S]`` on the CPU, not to be written to: position ``i`` of block order holds natural token ``result[i]``,
        visual tokens first, then prefix, then suffix. ``None`` if the order leaves the visual tokens as they are.

    Raises:
        ValueError: unknown order, wrong values, or an order of a grid for a geometry without one.
    """
    return _order_index(parse_spec(order), geometry)


@lru_cache(maxsize=64)
def _order_index(spec: Spec, geometry: TokenGeometry) -> Tensor | None:
    if geometry.grid is None and spec.name != "raster":
        ORDERS.entry(spec.name)
        raise ValueError(f"order '{spec}' needs a grid (frames, height, width), got the geometry {geometry}")
    visual = ORDERS.create(spec, geometry.axes)
    if bool((visual == torch.arange(geometry.visual)).all()):
        return None
    return _with_extra(visual, geometry)


def visual_first(geometry: TokenGeometry) -> Tensor:
    """Raster order with the extra tokens behind the visual ones, int32 ``[S]``; see :func:`token_order`."""
    return _with_extra(torch.arange(geometry.visual), geometry)


def _with_extra(visual: Tensor, geometry: TokenGeometry) -> Tensor:
    behind = geometry.prefix + geometry.visual
    parts = (visual + geometry.prefix, torch.arange(geometry.prefix), torch.arange(behind, geometry.tokens))
    return torch.cat(parts).to(torch.int32)


def token_order(
    orders: Sequence[str | Spec],
    head_choice: Tensor,
    geometry: TokenGeometry,
    device: torch.device | str = "cpu",
) -> TokenOrder | None:
    """Orders of all heads as kernels want them.

    As soon as one order moves tokens, every row has the extra tokens last, those of ``"raster"`` and ``"fhw"`` included:
    the blocks with extra tokens are then the same for all heads.

    Args:
        orders: the choices, such as :data:`AXIS_ORDERS`.
        head_choice: integers ``[H]``, index into ``orders`` for each head; may live on any device.
        geometry: layout of the sequence.
        device: where the table goes.

    Returns:
        The order, or ``None`` when all ``orders`` are the natural one.

    Raises:
        ValueError: an order does not apply, ``orders`` is empty, or ``head_choice`` is not ``[H]``; values of
            ``head_choice`` are checked only on the CPU, where that needs no synchronisation.
    """
    if not orders:
        raise ValueError("orders must name at least one order, got none")
    if head_choice.dim() != 1 or head_choice.is_floating_point():
        raise ValueError(
            f"head_choice must be integers [heads], got {head_choice.dtype} of shape {tuple(head_choice.shape)}"
        )
    if head_choice.device.type == "cpu" and head_choice.numel():
        low, high = int(head_choice.min()), int(head_choice.max())
        if low < 0 or high >= len(orders):
            raise ValueError(f"head_choice must lie in 0..{len(orders) - 1}, got values from {low} to {high}")
    rows = [order_index(order, geometry) for order in orders]
    if all(row is None for row in rows):
        return None
    table = torch.stack([visual_first(geometry) if row is None else row for row in rows])
    return TokenOrder(table.to(device), head_choice.to(device=device, dtype=torch.int32))


def inverse_index(index: Tensor) -> Tensor:
    """Inverse of a permutation ``[..., S]``: natural token ``i`` stands at position ``result[i]``."""
    positions = torch.arange(index.shape[-1], device=index.device, dtype=index.dtype).expand_as(index)
    return torch.empty_like(index).scatter_(-1, index.long(), positions)


def extra_blocks(geometry: TokenGeometry, order_is_identity: bool, block: int) -> Tensor:
    """Which blocks hold any extra (text, reference, conditioning) token.

    Args:
        geometry: layout of the sequence.
        order_is_identity: whether the tokens stand in natural order (:func:`order_index` gave ``None``) rather than with
            the extra tokens last.
        block: tokens in a block.

    Returns:
        bool ``[ceil(S / block)]`` on the CPU, in block order.
    """
    if block < 1:
        raise ValueError(f"block must be at least 1 token, got {block}")
    extra = torch.zeros(-(-geometry.tokens // block) * block, dtype=torch.bool)
    if order_is_identity:
        extra[: geometry.prefix] = True
        extra[geometry.prefix + geometry.visual : geometry.tokens] = True
    else:
        extra[geometry.visual : geometry.tokens] = True
    return extra.view(-1, block).any(-1)


def clear_caches() -> None:
    """Forget all computed orders."""
    _order_index.cache_clear()
