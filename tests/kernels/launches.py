"""What Triton's launcher in C gets, from the usual way and from replays alike; the driver behind it does nothing."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from torch import Tensor

from dit_accel_kernels import programs
from dit_accel_kernels.replay import forget_replays

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import _idle_driver

__all__ = ["REASON", "Log", "agree", "same_form", "watched"]

REASON = _idle_driver.why_not()
_HEAD = 13  # arguments of the launcher before those of the kernel
_LEAST_ADDRESS = 1 << 32

Log = list[tuple[Any, ...]]
_log: Log = []  # one for the process: a compiled kernel keeps the launcher that it was given first


@contextlib.contextmanager
def watched() -> Iterator[Log]:
    """In this context launches go to a driver that does nothing, and are listed."""
    from triton.backends.nvidia import driver

    wrap = driver.wrap_handle_tensordesc
    _log.clear()
    forget_replays()
    with (
        _idle_driver.idle_driver(),
        mock.patch.object(driver, "wrap_handle_tensordesc", lambda start, *rest: wrap(_spy(start), *rest)),
        mock.patch.object(programs, "_in_c", _behind),
    ):
        yield _log
    forget_replays()


@functools.cache
def _spy(start: Callable[..., None]) -> Callable[..., None]:
    def launcher(*args: Any) -> None:
        _log.append(tuple(_plain(arg) for arg in (*args[:5], args[9], *args[_HEAD:])))
        start(*args)

    return launcher


def _behind(start: Any) -> Any:
    """The spy before a launcher; where a kernel takes descriptors it stands behind what makes them."""
    cells = dict(zip(start.__code__.co_freevars, (cell.cell_contents for cell in start.__closure__)))
    return cells.get("launcher", start)


def _plain(value: Any) -> Any:
    """A number for a tensor, address and all else for a descriptor."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    if type(value).__name__ == "PyCUtensorMap":
        map_at = -(-(id(value) + object.__basicsize__) // 128) * 128
        raw = ctypes.string_at(map_at, 128)
        return int.from_bytes(raw[:8], "little"), raw[8:]
    return value


def same_form(log: Log, *known: Tensor | None) -> Log:
    """Launches with the addresses of what was allocated between them replaced by numbers, in order of appearance."""
    fixed = {x.data_ptr() for x in known if x is not None}
    names: dict[int, str] = {}

    def named(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(named(part) for part in value)
        if isinstance(value, bool) or not isinstance(value, int) or value < _LEAST_ADDRESS or value in fixed:
            return value
        return names.setdefault(value, f"made {len(names)}")

    return [tuple(named(value) for value in entry) for entry in log]


def agree(found: Log, wanted: Log) -> bool:
    """Whether launches in the form of :func:`same_form` are the wanted ones; memory that was free again may serve twice.

    Args:
        found: whose addresses may each stand for several tensors, one after the other.
        wanted: whose addresses stand for one tensor each.
    """
    served: dict[str, str] = {}

    def same(one: Any, other: Any) -> bool:
        if isinstance(one, tuple) and isinstance(other, tuple):
            return len(one) == len(other) and all(map(same, one, other))
        if isinstance(one, str) and isinstance(other, str) and other.startswith("made "):
            return served.setdefault(other, one) == one
        return bool(one == other)

    return len(found) == len(wanted) and all(map(same, found, wanted))
