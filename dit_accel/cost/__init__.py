"""Sparse only where it is faster: times of one layer, measured once for each shape and kept on disk.

``store`` keeps them, ``measure`` takes them, ``model`` says whether a method pays over a run.
"""

from dit_accel.cost.model import CostModel, switched_off
from dit_accel.cost.store import Cost, CostKey, CostStore, cache_dir

__all__ = ["Cost", "CostKey", "CostModel", "CostStore", "cache_dir", "switched_off"]
