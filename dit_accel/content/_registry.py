"""The registry of content orders, and what one returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel._specs import Registry
from dit_accel.geometry import TokenGeometry
from dit_accel_kernels.types import TokenOrder

__all__ = ["CONTENT_ORDERS", "ContentOrder", "head_order"]


@dataclass(frozen=True, eq=False)
class ContentOrder:
    """Orders of the queries and of the keys, each ``None`` for natural order.

    An order that is not ``None`` lays the sequence out as visual tokens, prefix, suffix; see :func:`head_order`.
    """

    query: TokenOrder | None
    key: TokenOrder | None


CONTENT_ORDERS: Registry[ContentOrder] = Registry("content order")
"""Rules ``(ctx, *values) -> ContentOrder`` for a context with one batch element.

Traits: ``cost``, work in dense attentions; ``by_head`` (bool), each head is ordered apart from the others."""


def head_order(visual: Tensor, geometry: TokenGeometry) -> TokenOrder:
    """A token order from a permutation of the visual tokens by head.

    Args:
        visual: integers ``[H, V]``: position ``i`` of head ``h`` holds visual token ``visual[h, i]``, from the first visual
            token.
        geometry: where the tokens sit; extra tokens go behind the visual ones, prefix first.
    """
    heads, device = visual.shape[0], visual.device
    behind = geometry.prefix + geometry.visual
    before = torch.arange(geometry.prefix, device=device)  # made there: a copy from the host would wait
    extra = torch.cat((before, torch.arange(behind, geometry.tokens, device=device)))
    table = torch.cat((visual + geometry.prefix, extra.expand(heads, -1)), 1).to(torch.int32)
    return TokenOrder(table.contiguous(), torch.arange(heads, dtype=torch.int32, device=device))
