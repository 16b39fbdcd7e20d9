"""What a profile puts in for each network of VBench."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Slot", "absent"]


def _usable() -> str | None:
    return None


@dataclass(frozen=True)
class Slot:
    """One extractor of a profile.

    Attributes:
        id: how results name it.
        load: gives the callable that the dimension's formula wants, for a device.
        missing: why it cannot be used here, ``None`` if it can.
    """

    id: str
    load: Callable[[str], Callable[..., Any]]
    missing: Callable[[], str | None] = _usable


def absent(dimension: str, what: str) -> Slot:
    """A dimension for which a profile has no extractor."""
    reason = f"{dimension} needs {what}, for which no package carries weights; use profile 'official'"

    def load(device: str) -> Callable[..., Any]:
        raise ValueError(reason)

    return Slot("none", load, lambda: reason)
