"""Speed: dense against accelerated on one prompt, with the quality of the same clips beside every number."""

from __future__ import annotations

from dit_accel_eval.speed.measure import BenchOptions, bench

__all__ = ["BenchOptions", "bench"]
