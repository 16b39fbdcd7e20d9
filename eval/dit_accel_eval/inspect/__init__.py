"""Real attention of chosen layers, heads and steps, captured with bounded memory, and a page to look at it."""

from __future__ import annotations

from .model import Capture, Look
from .session import capture
from .viewer import write_viewer

__all__ = ["Capture", "Look", "capture", "write_viewer"]
