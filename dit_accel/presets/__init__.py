"""The methods that ship, each a JSON file beside this one, so that adding one touches no code; and registered ones."""

from __future__ import annotations

import difflib
from functools import cache
from importlib import resources

from dit_accel.method import Method

__all__ = ["get_method", "load_methods", "register_method"]

_registered: dict[str, Method] = {}


@cache
def _builtin() -> dict[str, Method]:
    found: dict[str, Method] = {}
    for entry in sorted(resources.files(__package__).iterdir(), key=lambda e: e.name):
        if entry.name.endswith(".json"):
            method = Method.from_json(entry.read_text(encoding="utf-8"))
            found[method.name] = method
    return found


def load_methods() -> dict[str, Method]:
    """All methods, by name: those that ship, then registered ones."""
    return {**_builtin(), **_registered}


def register_method(method: Method) -> Method:
    """Make a method known by its name, to :func:`dit_accel.enable` and to the command line of the same process.

    Registering an equal method again does nothing, so that a module may be imported twice.

    Args:
        method: the method.

    Returns:
        The same method.

    Raises:
        TypeError: for anything but a :class:`~dit_accel.method.Method`.
        ValueError: if another method has this name.
    """
    if not isinstance(method, Method):
        raise TypeError(f"register_method takes a Method, got {type(method).__name__}")
    known = load_methods().get(method.name)
    if known is not None and known != method:
        kind = "ships with dit_accel" if method.name in _builtin() else "is registered already"
        raise ValueError(f"another method {method.name!r} {kind}; choose a name of your own")
    if known is None:
        _registered[method.name] = method
    return method


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
    known = load_methods()
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"unknown method {name!r}; known are {', '.join(known)}{hint}")
