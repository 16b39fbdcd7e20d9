"""Measuring what acceleration does to a clip: metrics, speed, comparisons, reports, attention maps.

Importing this package imports none of its optional libraries; the modules that need them do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dit_accel_eval.compare import Configuration
    from dit_accel_eval.runs import EvalError, EvalOptions, evaluate
    from dit_accel_eval.speed import bench

__all__ = ["Configuration", "EvalError", "EvalOptions", "bench", "evaluate"]

_HOMES = {
    "Configuration": "compare",
    "EvalError": "runs",
    "EvalOptions": "runs",
    "bench": "speed",
    "evaluate": "runs",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
