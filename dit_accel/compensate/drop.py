"""Skipped blocks are dropped, as most methods do."""

from __future__ import annotations

from dit_accel.compensate._registry import COMPENSATIONS, Compensation


@COMPENSATIONS.register("drop")
def drop() -> Compensation:
    """Skipped blocks have no part in the softmax."""
    return Compensation()
