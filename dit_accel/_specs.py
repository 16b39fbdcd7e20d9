"""Short strings that name a method and its parameters, and registries that resolve them.

A spec is ``name`` or ``name:value,value,key=value``: ``"axes"``, ``"top_k:0.2"``, ``"brick:4x4x4"``,
``"top_p:p=0.9,min=2"``. Values are ``true``/``false``, ``none``, integers, floats, sizes such as ``4x4x4`` or
``fullx24x24``, or words.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Generic, TypeVar

__all__ = ["Entry", "Registry", "Spec", "Value", "parse_spec"]

Size = tuple[int | str, ...]
Value = bool | int | float | str | None | Size

_NAME = re.compile(r"[A-Za-z_][\w\-]*\Z")
_VALUE = re.compile(r"[^\s,=]+\Z")
_INT = re.compile(r"[+-]?\d+\Z")
_SIZE = re.compile(r"(?:-?\d+|full)(?:x(?:-?\d+|full))+\Z")
_WORDS: dict[str, Value] = {"true": True, "false": False, "none": None}


@dataclass(frozen=True, eq=False)
class Spec:
    """A parsed spec: immutable, hashable, and equal to ``parse_spec(str(spec))``.

    Two specs are equal when they are written alike: ``top_k:1`` and ``top_k:1.0`` differ.

    Attributes:
        name: name of the method in its registry.
        args: positional values.
        kwargs: keyword values, read-only.
    """

    name: str
    args: tuple[Value, ...] = ()
    kwargs: Mapping[str, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _NAME.match(self.name):
            raise ValueError(f"a spec must start with a name of letters, digits, '_' or '-', got {self.name!r}")
        object.__setattr__(self, "args", tuple(self.args))
        object.__setattr__(self, "kwargs", MappingProxyType(dict(self.kwargs)))
        for value in (*self.args, *self.kwargs.values()):
            if isinstance(value, str) and _parse_value(value, str(self)) != value:
                raise ValueError(f"a word must not read as a number, size or true/false/none, got {value!r}")

    def __eq__(self, other: object) -> bool:
        return str(self) == str(other) if isinstance(other, Spec) else NotImplemented

    def __hash__(self) -> int:
        return hash(str(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return (Spec, (self.name, self.args, dict(self.kwargs)))

    def __str__(self) -> str:
        values = [_format(value) for value in self.args]
        values += [f"{key}={_format(self.kwargs[key])}" for key in sorted(self.kwargs)]
        return f"{self.name}:{','.join(values)}" if values else self.name


def parse_spec(text: str | Spec) -> Spec:
    """Parse a spec string; a :class:`Spec` is returned as it is.

    Args:
        text: for example ``"top_p:0.9,min=2"``.

    Returns:
        The parsed spec.

    Raises:
        ValueError: the string is malformed; the message shows the string and what was expected.
        TypeError: ``text`` is neither a string nor a spec.
    """
    if isinstance(text, Spec):
        return text
    if not isinstance(text, str):
        raise TypeError(f"a spec must be a string such as 'top_k:0.2', got {text!r} of type {type(text).__name__}")
    return _parse(text)


@lru_cache(maxsize=1024)
def _parse(text: str) -> Spec:
    name, colon, rest = text.strip().partition(":")
    if not _NAME.match(name.strip()):
        raise ValueError(f"a spec must look like 'name' or 'name:value,key=value', got {text!r}")
    if colon and not rest.strip():
        raise ValueError(f"a value must follow ':' in the spec {text!r}")
    args: list[Value] = []
    kwargs: dict[str, Value] = {}
    for item in rest.split(",") if rest.strip() else []:
        key, equals, raw = item.partition("=")
        if not equals:
            if kwargs:
                raise ValueError(f"positional value {item.strip()!r} must stand before key=value in the spec {text!r}")
            args.append(_parse_value(item.strip(), text))
            continue
        key = key.strip()
        if not _NAME.match(key):
            raise ValueError(f"a key must be a word, got {key!r} in the spec {text!r}")
        if key in kwargs:
            raise ValueError(f"key {key!r} must be given once, got it twice in the spec {text!r}")
        kwargs[key] = _parse_value(raw.strip(), text)
    return Spec(name.strip(), tuple(args), kwargs)


def _parse_value(raw: str, text: str) -> Value:
    if not raw or not _VALUE.match(raw):
        raise ValueError(f"a value must be a number, a size such as 4x4x4 or a word, got {raw!r} in the spec {text!r}")
    if raw.lower() in _WORDS:
        return _WORDS[raw.lower()]
    if _INT.match(raw):
        return int(raw)
    if _SIZE.match(raw):
        return tuple(part if part == "full" else int(part) for part in raw.split("x"))
    try:
        return float(raw)
    except ValueError:
        return raw


def _format(value: Value) -> str:
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value)


T = TypeVar("T")


@dataclass(frozen=True)
class Entry(Generic[T]):
    """One registered method.

    Attributes:
        name: name used in specs.
        factory: callable that makes or computes it.
        summary: first line of the factory's docstring.
        paper: where it was published, for example ``"arXiv 2506.16054"``; empty if nowhere.
        traits: further facts about it that its registry's users look at.
    """

    name: str
    factory: Callable[..., T]
    summary: str
    paper: str
    traits: Mapping[str, Any] = field(default_factory=dict)


@lru_cache(maxsize=1024)
def _signature(factory: Callable[..., Any]) -> inspect.Signature:
    """The parameters of a factory; looking at them takes longer than most calls."""
    return inspect.signature(factory)


class Registry(Generic[T]):
    """Names of one kind of method, in the order of registration.

    Args:
        kind: what the names stand for, used in messages, for example ``"order"``.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Entry[T]] = {}

    def register(self, name: str, *, paper: str = "", **traits: Any) -> Callable[[Callable[..., T]], Callable[..., T]]:
        """Decorator that adds a factory under ``name``, with further ``traits`` that :meth:`trait` gives.

        Raises:
            ValueError: the name is taken or no valid spec name.
        """
        if not _NAME.match(name):
            raise ValueError(f"name of {self.kind} must be letters, digits, '_' or '-', got {name!r}")
        if name in self._entries:
            raise ValueError(f"{self.kind} {name!r} is registered already")

        def add(factory: Callable[..., T]) -> Callable[..., T]:
            summary = (inspect.getdoc(factory) or "").partition("\n")[0]
            self._entries[name] = Entry(name, factory, summary, paper, MappingProxyType(traits))
            return factory

        return add

    def entry(self, name: str) -> Entry[T]:
        """The entry called ``name``.

        Raises:
            ValueError: nothing has this name; the message lists what there is and the closest match.
        """
        if name in self._entries:
            return self._entries[name]
        close = difflib.get_close_matches(name, self._entries, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{self.kind} must be one of {', '.join(self.names())}, got {name!r}{hint}")

    def create(self, spec: str | Spec, *leading: Any) -> T:
        """Call the factory that ``spec`` names with ``leading`` arguments, then those of the spec.

        Raises:
            ValueError: the name is unknown or the values do not fit the factory's parameters.
        """
        spec = parse_spec(spec)
        self.check(spec, len(leading))
        return self.entry(spec.name).factory(*leading, *spec.args, **spec.kwargs)

    def check(self, spec: str | Spec, leading: int) -> None:
        """Check a spec without calling its factory, which takes ``leading`` arguments before those of the spec.

        Raises:
            ValueError: the name is unknown or the values do not fit the factory's parameters.
        """
        spec = parse_spec(spec)
        signature = _signature(self.entry(spec.name).factory)
        try:
            signature.bind(*[None] * leading, *spec.args, **spec.kwargs)
        except TypeError as error:
            wanted = ", ".join(str(p) for p in list(signature.parameters.values())[leading:]) or "nothing"
            raise ValueError(f"{self.kind} {spec.name!r} takes ({wanted}), got '{spec}': {error}") from None

    def argument(self, spec: str | Spec, leading: int, name: str) -> Any:
        """The value that a checked spec gives to a parameter of its factory, or the parameter's default."""
        spec = parse_spec(spec)
        bound = _signature(self.entry(spec.name).factory).bind(*[None] * leading, *spec.args, **spec.kwargs)
        bound.apply_defaults()
        return bound.arguments[name]

    def trait(self, spec: str | Spec, name: str, default: Any = None) -> Any:
        """A trait of the entry that ``spec`` names, or ``default``."""
        return self.entry(parse_spec(spec).name).traits.get(name, default)

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[Entry[T]]:
        return iter(self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)
