"""Launches made again without the Python that led to them.

Checks, choices, strides, descriptors and Triton's binder take the host some hundred microseconds of Python in each sparse
call, and lead to the same few launches each time: only addresses differ. :class:`Replays` watches one such call
(:mod:`.recording`), and for later calls whose tensors have the same layout it makes the same launches with their
addresses (:mod:`.programs`). What no recording can account for goes the usual way, and so does all where a profiler waits
for launches, addresses are odd or Triton's launcher is not the one that is known here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from .programs import Program, Ready, make_program
from .recording import Recording

__all__ = ["Launches", "Replays", "forget_replays"]

Result = tuple[Tensor, Tensor | None]

_TRIES = 3  # recordings that may fail: the first call of all may run self-tests
_PROGRAMS, _READY = 256, 4
_programs: dict[Hashable, Program] = {}
_failed: Counter[Hashable] = Counter()


def forget_replays() -> None:
    """Forget what was recorded; it is recorded anew when needed. Who holds a :class:`Replays` keeps what it has."""
    _programs.clear()
    _failed.clear()


class Replays:
    """Calls of one function that differ in the tensors that move only.

    Args:
        stays: tensors that every call uses, ``None`` where there is none. They are not kept: who makes this sees to it that
            they live, at their addresses, as long as it is used.
        key: what else decides which launches the function makes.
    """

    def __init__(self, stays: Sequence[Tensor | None], key: Hashable) -> None:
        self._stays = tuple(0 if x is None else x.data_ptr() for x in stays)
        layouts = tuple(None if x is None else (x.shape, x.stride(), x.dtype, x.data_ptr() % 16) for x in stays)
        alike = tuple(self._stays.index(address) for address in self._stays)
        self._key = (key, layouts, alike)
        self._bound: dict[Hashable, Launches | None] = {}
        self._latest: tuple[Hashable, Launches | None] = ((), None)

    def __call__(
        self, function: Callable[..., Result], moving: tuple[Tensor, ...], key: Hashable, *args: Any
    ) -> Result:
        """``function(*moving, *args)``, if possible by making its launches again.

        Args:
            function: allocates its results; what it does is decided by the layout of tensors, and by keys.
            moving: tensors on one CUDA device whose addresses may differ from call to call; not changed.
            key: layout of ``moving``, and all of ``args`` that decides anything.
            args: further arguments.

        Returns:
            A tensor and another or ``None``.
        """
        if key not in self._bound:
            return self._first(function, moving, key, *args)
        bound = self._bound[key]
        self._latest = key, bound
        made = None if bound is None else bound(moving)
        return function(*moving, *args) if made is None else made

    def again(self, moving: tuple[Tensor, ...], key: Hashable) -> Result | None:
        """What :meth:`__call__` returns for the key of the call before; ``None`` for another, or without a replay."""
        bound = self.latest(key)
        return None if bound is None else bound(moving)

    def latest(self, key: Hashable) -> Launches | None:
        """What the call before has launched, if it was one of this key and its launches can be made again."""
        latest, bound = self._latest
        # Comparing is quicker than looking up: long keys are slow to hash.
        return None if bound is None or key != latest else bound

    def _first(self, function: Callable[..., Result], moving: tuple[Tensor, ...], key: Hashable, *args: Any) -> Result:
        """The first call with such tensors: recorded, unless that of another caller was."""
        structure = (self._key, key)
        program = _programs.get(structure)
        if program is not None:
            bound = self._bound[key] = Launches(program, self._stays)
            made = bound(moving)
            return function(*moving, *args) if made is None else made
        addresses = [x.data_ptr() for x in moving]
        fits = len(set(addresses)) == len(addresses) and not any(address % 16 for address in addresses)
        if not fits or torch.cuda.is_current_stream_capturing():
            return function(*moving, *args)
        with Recording([*addresses, *self._stays], moving) as recording:
            result = function(*moving, *args)
        program = make_program(recording, len(moving), len(self._stays), [x for x in result if x is not None])
        if program is None:
            _put(_failed, structure, _failed[structure] + 1, 4 * _PROGRAMS)
            if _failed[structure] >= _TRIES:
                self._bound[key] = None
            return result
        self._bound[key] = Launches(program, self._stays)
        if not program.pinned:
            _put(_programs, structure, program, _PROGRAMS)
        return result


class Launches:
    """A program whose tensors that stay are known.

    Args:
        program: what is launched.
        stays: addresses of the tensors that stay.
    """

    def __init__(self, program: Program, stays: tuple[int, ...]) -> None:
        from triton import knobs

        self.program, self.stays = program, stays
        self._runtime, self._index = knobs.runtime, program.device.index or 0
        self._starters = tuple(starter.settled(stays) for starter in program.starters)
        self._ready: dict[tuple[int, ...], tuple[Ready, ...]] = {}

    def __call__(self, moving: tuple[Tensor, ...]) -> Result | None:
        """Launch; ``None``, and nothing has happened, if the call has to go the usual way."""
        made = [
            torch.empty_strided(shape, steps, dtype=dtype, device=self.program.device)
            for shape, steps, dtype in self.program.results
        ]
        if not self._starts(moving, made):
            return None
        return made[0], made[1] if len(made) > 1 else None

    def like(self, given: Tensor, moving: tuple[Tensor, ...]) -> Tensor | None:
        """The first result with the shape, strides and dtype of ``given``, where it has these but for their order."""
        made = [torch.empty_like(given)]
        for shape, steps, dtype in self.program.results[1:]:
            made.append(torch.empty_strided(shape, steps, dtype=dtype, device=self.program.device))
        return made[0] if self._starts(moving, made) else None

    def _starts(self, moving: tuple[Tensor, ...], made: list[Tensor]) -> bool:
        """Start all kernels, which write ``made``, unless the call has to go the usual way."""
        if self._runtime.launch_enter_hook.calls or self._runtime.launch_exit_hook.calls:
            return False
        if _current_device() == self._index:
            return self._launch(moving, made)
        with torch.cuda.device(self._index):
            return self._launch(moving, made)

    def _launch(self, moving: tuple[Tensor, ...], made: list[Tensor]) -> bool:
        device = self.program.device
        rooms = [torch.empty(size, dtype=torch.uint8, device=device) for size in self.program.rooms]
        addresses = (_current_stream(self._index), *[x.data_ptr() for x in (*moving, *made, *rooms)])
        ready = self._ready.get(addresses)
        if ready is None:
            if any([address % 16 for address in addresses[1:]]):
                return False
            ready = tuple([starter.filled(addresses) for starter in self._starters])
            _put(self._ready, addresses, ready, _READY)  # allocators give the same addresses again and again
        for start, args in ready:
            start(*args)
        return True


def _put(where: dict[Any, Any], key: Any, value: Any, most: int) -> None:
    """Put into a dictionary that must not grow without bound."""
    if len(where) >= most and key not in where:
        where.clear()
    where[key] = value


def _current_device() -> int:
    return torch._C._cuda_getDevice()


def _current_stream(index: int) -> int:
    return torch._C._cuda_getCurrentRawStream(index)
