"""The methods that ship: each a JSON file beside this one, so that adding one touches no code."""

from __future__ import annotations

import difflib
from functools import cache
from importlib import resources

from dit_accel.method import Method

__all__ = ["get_method", "load_methods"]


@cache
def _builtin() -> dict[str, Method]:
    found: dict[str, Method] = {}
    for entry in sorted(resources.files(__package__).iterdir(), key=lambda e: e.name):
        if entry.name.endswith(".json"):
            method = Method.from_json(entry.read_text(encoding="utf-8"))
            found[method.name] = method
    return found


def load_methods() -> dict[str, Method]:
    """All methods that ship, by name."""
    return dict(_builtin())


def get_method(name: str | Method) -> Method:
    """Look a method up, or pass one through.

    Raises:
        ValueError: for an unknown name, with the known ones and the closest match.
        TypeError: for anything but a name or a :class:`~dit_accel.method.Method`.
    """
    if isinstance(name, Method):
        return name
    if not isinstance(name, str):
        raise TypeError(f"method must be a name or a Method, got {type(name).__name__}")
    known = _builtin()
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"unknown method {name!r}; known are {', '.join(known)}{hint}")
