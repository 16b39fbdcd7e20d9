"""Compensation: what becomes of the blocks that are skipped.

Each rule stands in a file of this folder and registers itself in :data:`COMPENSATIONS`: a factory ``(*values)`` of a
:class:`Compensation`.
"""

from __future__ import annotations

from dit_accel._discover import import_all
from dit_accel.compensate._registry import COMPENSATIONS, Compensation, SparseCall, WorkSizes, make_compensation

__all__ = ["COMPENSATIONS", "Compensation", "SparseCall", "WorkSizes", "make_compensation"]

import_all(__name__, __path__)
