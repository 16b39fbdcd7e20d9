"""Patterns: masks that follow from where the tokens sit, without looking at them.

Each rule stands in a file of this folder and registers itself in :data:`PATTERNS`: a function ``(ctx, *values)`` of a
:class:`PatternContext`. A method names it in its ``score`` slot, as it does a score of the data.
"""

from __future__ import annotations

from dit_accel._discover import import_all
from dit_accel.pattern._registry import PATTERNS, Pattern, PatternContext, make_pattern

__all__ = ["PATTERNS", "Pattern", "PatternContext", "make_pattern"]

import_all(__name__, __path__)
