"""Choices: how each head picks among the candidate orders.

Each rule stands in a file of this folder and registers itself in :data:`CHOICES`: a function ``(ctx, table, *values)`` that
returns the candidate of each head.
"""

from __future__ import annotations

from dit_accel._discover import import_all
from dit_accel.choice._registry import CHOICES

__all__ = ["CHOICES"]

import_all(__name__, __path__)
