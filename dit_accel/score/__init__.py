"""Block scores: estimates of how much softmax mass each block of keys gets from each block of queries.

Each rule stands in a file of this folder and registers itself in :data:`SCORES`: a function ``(ctx, *values)`` of a
:class:`~dit_accel.context.PlanContext` and the values of its spec, which returns scores ``[B, H, Qb, Kb]`` or
:class:`Scores`.
"""

from __future__ import annotations

from dit_accel._discover import import_all
from dit_accel.score._registry import SCORES, Gather, Scores, block_scores

__all__ = ["SCORES", "Gather", "Scores", "block_scores"]

import_all(__name__, __path__)
