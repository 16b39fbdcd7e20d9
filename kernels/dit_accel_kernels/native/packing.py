"""Recorded launches as the arrays that ``again.c`` reads.

The arguments of all launches of a call lie in one run of bytes, each at a place of its own; those that differ from call to
call have slots. What Triton's launcher would pass is passed: see ``make_launcher`` in its ``backends/nvidia/driver.py``.
"""

from __future__ import annotations

import ctypes
import functools
import re
import struct
from array import array
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..programs import HEAD, Program, Slot, Starter

if TYPE_CHECKING:
    from ..replay import Launches

__all__ = ["Form", "descriptor", "make_call", "types_of"]

_MAP, _ALIGN = 128, 128  # bytes of a descriptor of the copy engine, and what its address is a multiple of
_FORMATS = {"i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "B", "u8": "B", "u16": "H", "u32": "I"}
_FORMATS |= {"u64": "Q", "fp32": "f", "f32": "f", "fp64": "d"}
_LARGE = 1 << 14
_STREAM = 3  # where the launcher takes the stream
_MOST = 256


class _UnknownError(Exception):
    """Something that is not known here; the call goes through Python."""


class Form(NamedTuple):
    """What query, key and value ``[B, S, H, D]`` of a call look like.

    Attributes:
        shape: of each.
        strides: of query, key and value.
        dtype: of each.
        device: of each.
    """

    shape: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    device: torch.device


class _Packed(NamedTuple):
    """The launches of a program: the arrays, and the slots of tensors that stay."""

    launches: bytes
    params: bytes
    slots: bytes
    blob: bytes
    stays: tuple[Slot, ...]


def make_call(
    module: Any, launches: Launches, form: Form, scale: float | None, quiet: tuple[list[Any], ...]
) -> Any | None:
    """A ``Call`` of the module in C that launches what ``launches.like`` does, ``None`` if it cannot be said there.

    Args:
        module: of :mod:`dit_accel_kernels.native`.
        launches: what is launched for query, key and value.
        form: what these look like.
        scale: the operator's argument.
        quiet: lists that must be empty.
    """
    try:
        packed = _pack(launches.program)
        blob = bytearray(packed.blob)
        for place, source, offset, make in packed.stays:
            _put(blob, place, _pointer(launches.stays[-1 - source] + offset, make))
        made = _made(module, launches.program)
        return module.Call(
            _form(module, form), packed.launches, packed.params, packed.slots, made, bytes(blob), scale, quiet
        )
    except (_UnknownError, AttributeError, LookupError, TypeError, ValueError, struct.error):
        return None  # Triton is another one than was known when this was written


def _form(module: Any, form: Form) -> bytes:
    if len(form.shape) != 4:
        raise _UnknownError
    dtype, kind, index = _codes(module, form.dtype, form.device)
    strides = [step for steps in form.strides for step in steps]
    return array("q", [dtype, kind, index, form.device.index or 0, *form.shape, *strides]).tobytes()


@functools.lru_cache(maxsize=64)
def _codes(module: Any, dtype: torch.dtype, device: torch.device) -> tuple[int, int, int]:
    """How torch numbers a dtype, a kind of device and a device."""
    with torch.inference_mode(False):
        found = module.describe(torch.empty(1, dtype=dtype, device=device))
    return found[3], found[4], found[5]


def _made(module: Any, program: Program) -> bytes:
    """Allocations of a call behind its first result."""
    found = array("q")
    rooms = [(torch.Size((size,)), (1,), torch.uint8) for size in program.rooms]
    for shape, steps, dtype in (*program.results[1:], *rooms):
        if not 1 <= len(shape) <= 4:
            raise _UnknownError
        fill = [0] * (4 - len(shape))
        found.extend([_codes(module, dtype, program.device)[0], len(shape), *shape, *fill, *steps, *fill])
    return found.tobytes()


def _pack(program: Program) -> _Packed:
    """The launches of a program, which many layers share."""
    known = _known.get(id(program))
    if known is None or known[0] is not program:
        if len(_known) >= _MOST:
            _known.clear()
        known = _known[id(program)] = program, _lay_out(program)
    return known[1]


_known: dict[int, tuple[Program, _Packed]] = {}


def _lay_out(program: Program) -> _Packed:
    launches, params, slots, blob, stays = array("q"), array("q"), array("q"), bytearray(), list[Slot]()
    for starter, kernel in zip(program.starters, program.kernels, strict=True):
        first, open_at = len(params), {slot.place: slot for slot in starter.slots}
        if open_at.pop(_STREAM, None) is None:
            raise _UnknownError
        for place, (kind, value) in enumerate(_arguments(starter, kernel), len(HEAD)):
            if kind == "constexpr":
                continue
            at = _room(blob, _MAP if kind == "nvTmaDesc" else 8, _ALIGN if kind == "nvTmaDesc" else 8)
            params.append(at)
            slot = open_at.pop(place, None)
            if slot is None:
                _put(blob, at, _bits(kind, value))
            elif kind != "nvTmaDesc" and not (kind.startswith("*") and slot.make is None):
                raise _UnknownError
            elif slot.source < 0:
                stays.append(slot._replace(place=at))
            else:
                slots.extend([at, slot.source, slot.offset, kind == "nvTmaDesc"])
                if slot.make is not None:
                    _put(blob, at, _like(slot.make, program.device))
        if open_at:
            raise _UnknownError
        params.extend([_room(blob, 8, 8), _room(blob, 8, 8)])  # memory for the kernel itself and for a profiler: none
        launches.extend([*_how(starter), first, len(params) - first])
    return _Packed(launches.tobytes(), params.tobytes(), slots.tobytes(), bytes(blob), tuple(stays))


def _how(starter: Starter) -> list[int]:
    """Function, grid, threads, shared memory and attributes of a launch."""
    grid, function, cooperative, pdl = starter.args[:3], *starter.args[4:7]
    warps, ctas, shared = starter.args[9]
    if not 1 <= ctas <= 8 or starter.args[7:9] != [None, None]:
        raise _UnknownError
    return [function, *grid, 32 * warps, shared, int(pdl), int(cooperative), ctas]


def _arguments(starter: Starter, kernel: Any) -> list[tuple[str, Any]]:
    """Type and value of each argument of the launcher behind its head."""
    kinds, values = list(types_of(kernel)), starter.args[len(HEAD) :]
    if len(kinds) != len(values):
        raise _UnknownError
    return list(zip(kinds, values, strict=True))


def types_of(kernel: Any) -> Iterator[str]:
    """Types of the arguments that Triton's launcher of a kernel takes; of a descriptor come shape and strides behind it."""
    for kind in kernel.src.signature.values():
        if not isinstance(kind, str):
            raise _UnknownError
        if kind.startswith("tensordesc"):
            shape = re.search(r"\[([^]]*)\]", kind)
            if shape is None:
                raise _UnknownError
            dims = shape.group(1).count(",") + 1
            yield from ("nvTmaDesc", *["i32"] * dims, *["i64"] * dims)
        else:
            yield kind


def _room(blob: bytearray, size: int, align: int) -> int:
    """A place for an argument."""
    at = -(-len(blob) // align) * align
    blob.extend(bytes(at + size - len(blob)))
    return at


def _bits(kind: str, value: Any) -> bytes:
    """An argument as the kernel gets it, in 8 bytes."""
    if kind.startswith("*"):
        return struct.pack("<Q", 0 if value is None else value)
    if kind not in _FORMATS or value is None:
        raise _UnknownError
    return struct.pack("<" + _FORMATS[kind], value).ljust(8, b"\0")


def _put(blob: bytearray, place: int, what: bytes) -> None:
    blob[place : place + len(what)] = what


def _pointer(address: int, make: Callable[[int], Any] | None) -> bytes:
    """An address, or the descriptor of what lies there."""
    return struct.pack("<Q", address) if make is None else descriptor(make(address))


def descriptor(made: Any) -> bytes:
    """The bytes of Triton's object around a descriptor of the copy engine."""
    if type(made).__name__ != "PyCUtensorMap" or type(made).__basicsize__ != _MAP + _ALIGN or id(made) % _ALIGN:
        raise _UnknownError
    return ctypes.string_at(id(made) + _ALIGN, _MAP)


def _like(make: Callable[[int], Any], device: torch.device) -> bytes:
    """A descriptor to be moved to other addresses: one of memory that is there."""
    with torch.inference_mode(False):
        x = torch.empty(_LARGE, dtype=torch.uint8, device=device)
    return descriptor(make(x.data_ptr()))
