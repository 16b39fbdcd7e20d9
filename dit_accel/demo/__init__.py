"""``dit-accel demo``: one clip of a video pipeline, dense and accelerated, with quality, density and time."""

from __future__ import annotations

from dit_accel.demo.options import DemoError, DemoOptions
from dit_accel.demo.run import run_demo

__all__ = ["DemoError", "DemoOptions", "run_demo"]
