"""Tile shapes of the Triton kernel: the shipped table, what a user's GPU was measured to like better, and how.

Nothing is measured unless asked for: a first call takes the shape from a table. ``dit-accel tune`` measures
(:func:`dit_accel_kernels.tune.run.tune`) and writes a small file into the user's cache folder, which holds for one GPU and
one release of Triton. Modules: ``store`` (tables), ``candidates`` (what to try), ``measure`` (one case), ``run`` (all).
"""

from __future__ import annotations

from .store import TileEntry, cache_file, forget, measured_tiles, read_tiles, shipped_tiles, write_tiles

__all__ = [
    "TileEntry",
    "cache_file",
    "forget",
    "measured_tiles",
    "read_tiles",
    "shipped_tiles",
    "write_tiles",
]
