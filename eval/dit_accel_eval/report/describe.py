"""What a metric is, from the registry of paired metrics."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Description", "describe"]


@dataclass(frozen=True)
class Description:
    """What a metric is; ``known`` is false where this installation does not list it."""

    name: str
    summary: str = ""
    higher_is_better: bool = True
    extractor: str | None = None
    convention: str = ""
    known: bool = True


def describe(name: str) -> Description:
    """Look a metric up in the registry of paired metrics."""
    try:
        from dit_accel_eval.metrics import REGISTRY

        metric = REGISTRY[name]
    except (ImportError, AttributeError, LookupError, ValueError, TypeError):
        return Description(name, known=False)
    return Description(
        name,
        str(metric.summary),
        bool(metric.higher_is_better),
        metric.extractor,
        str(metric.convention or ""),
    )
