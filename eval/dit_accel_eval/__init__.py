"""Measuring what acceleration does to a clip: paired metrics, videos, attention maps, comparisons.

Importing this package imports none of its optional libraries; the modules that need them do.
"""

from __future__ import annotations

__all__: list[str] = []
