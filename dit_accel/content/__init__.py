"""Content orders: permutations that depend on the tokens themselves, for each head and batch element.

Each rule stands in a file of this folder and registers itself in :data:`CONTENT_ORDERS`: a function ``(ctx, *values)`` of a
:class:`~dit_accel.context.PlanContext` with a batch of one, which returns :class:`ContentOrder`. A method names it in its
``order`` slot, alone.
"""

from __future__ import annotations

from dit_accel._discover import import_all
from dit_accel.content._registry import CONTENT_ORDERS, ContentOrder, head_order

__all__ = ["CONTENT_ORDERS", "ContentOrder", "head_order"]

import_all(__name__, __path__)
