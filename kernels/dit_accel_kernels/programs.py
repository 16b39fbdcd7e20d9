"""The launches of a recorded call as arguments of Triton's launcher in C, with some addresses left open."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .recording import Address, Box, Launch, Recording

__all__ = ["HEAD", "Program", "Ready", "Slot", "Starter", "make_program"]

#: A launch with all its addresses: Triton's launcher in C, and what it is called with.
Ready = tuple[Callable[..., None], tuple[Any, ...]]

_Places = dict[int, tuple[int, int]]
_ALIGN = 256
_LARGE = 32 << 20  # bytes from which a tensor has an allocation of its own: one for all would split memory worse
#: What Triton's launcher takes before the arguments of the kernel, as its C says it.
HEAD = "iiiKKppOOOOOO"


class Slot(NamedTuple):
    """A missing address: a place among arguments, the number of its source and bytes behind it.

    ``make`` makes of the address what is passed, if that is not the address.
    """

    place: int
    source: int
    offset: int
    make: Callable[[int], Any] | None


class Starter(NamedTuple):
    """A launch with some addresses left open; what stands there in ``args`` has no meaning."""

    start: Callable[..., None]
    args: list[Any]
    slots: tuple[Slot, ...]

    def filled(self, addresses: tuple[int, ...]) -> Ready:
        """The launch with the addresses of all sources."""
        args = self.args.copy()
        for place, source, offset, make in self.slots:
            address = addresses[source] + offset
            args[place] = address if make is None else make(address)
        return self.start, tuple(args)

    def settled(self, stays: tuple[int, ...]) -> Starter:
        """The launch with the addresses of the tensors that stay."""
        mine = [slot for slot in self.slots if slot.source < 0]
        known = self._replace(slots=tuple(slot._replace(source=-1 - slot.source) for slot in mine))
        return Starter(self.start, list(known.filled(stays)[1]), tuple(slot for slot in self.slots if slot.source >= 0))


class Program(NamedTuple):
    """The launches of all calls of one layout.

    Attributes:
        starters: launches; sources are the stream (0), tensors that move, results and rooms, and downwards from -1 the
            tensors that stay.
        kernels: what is launched, lest it be unloaded.
        results: shape, strides and dtype of each tensor that is returned.
        rooms: bytes of the allocations for what nobody sees afterwards.
        device: where all of it is.
        pinned: other tensors that are used.
    """

    starters: tuple[Starter, ...]
    kernels: tuple[Any, ...]
    results: tuple[tuple[torch.Size, tuple[int, ...], torch.dtype], ...]
    rooms: tuple[int, ...]
    device: torch.device
    pinned: tuple[Tensor, ...]


def make_program(recording: Recording, moving: int, stays: int, returned: list[Tensor]) -> Program | None:
    """What a recording says about later calls, ``None`` if it is no full account.

    Args:
        recording: its named tensors are those that move, and then those that stay.
        moving: number of tensors that move.
        stays: number of tensors that stay.
        returned: what the recorded call has returned.
    """
    named = moving + stays
    places: _Places = {i: (1 + i, 0) for i in range(moving)} | {moving + i: (-1 - i, 0) for i in range(stays)}
    for number, x in enumerate(returned):
        found = recording.address(x)
        if found is None or found.source < named or found.offset or found.source in places:
            return None  # nothing new, or not a tensor of its own
        places[found.source] = (1 + moving + number, 0)
    written = {arg.source if isinstance(arg, Address) else arg.address.source for arg in _open_args(recording)}
    if not {source for source in places if source >= named} <= written:
        return None  # somebody else has computed what is returned
    rooms = _rooms(recording, named, places, 1 + moving + len(returned))
    starters = [_starter(launch, places) for launch in recording.launches]
    if recording.failure is not None or None in starters:
        return None
    return Program(
        tuple(starter for starter in starters if starter is not None),
        tuple(launch.compiled for launch in recording.launches),
        tuple((x.shape, x.stride(), x.dtype) for x in returned),
        rooms,
        returned[0].device,
        tuple(recording.pinned),
    )


def _open_args(recording: Recording) -> Iterator[Address | Box]:
    for launch in recording.launches:
        yield from (arg for arg in launch.args if isinstance(arg, Address | Box))


def _rooms(recording: Recording, first: int, places: _Places, source: int) -> tuple[int, ...]:
    """Put what is allocated for one call only into few allocations: the first for all that is small."""
    shared, rooms = 0, []
    for number, x in enumerate(recording.made, first):
        size = -(-x.untyped_storage().nbytes() // _ALIGN) * _ALIGN
        if number in places:
            continue
        if size >= _LARGE:
            rooms.append(size)
            places[number] = (source + len(rooms), 0)
        else:
            places[number] = (source, shared)
            shared += size
    return (shared, *rooms)


def _starter(launch: Launch, places: _Places) -> Starter | None:
    """A launch for Triton's launcher in C, ``None`` if that is not the one known here."""
    from triton.backends.nvidia import driver

    run = getattr(launch.compiled, "run", None)
    if not isinstance(run, driver.CudaLauncher) or getattr(driver, "_BASE_ARGS_FORMAT", None) != HEAD:
        return None
    start = _in_c(run.launch)
    if start is None or run.global_scratch_size or run.profile_scratch_size:
        return None
    args: list[Any] = [*(*launch.grid, 1, 1)[:3], None, launch.compiled.function]
    slots = [Slot(3, 0, 0, None)]
    args += [run.launch_cooperative_grid, run.launch_pdl, None, None, launch.compiled.packed_metadata, None, None, None]
    metas = iter(getattr(launch.compiled.metadata, "tensordesc_meta", None) or ())
    for value in launch.args:
        if isinstance(value, Address):
            source, offset = places[value.source]
            slots.append(Slot(len(args), source, offset + value.offset, None))
            args.append(None)
        elif isinstance(value, Box):
            source, offset = places[value.address.source]
            make = _maker(value.like, next(metas, None))
            if make is None:
                return None
            slots.append(Slot(len(args), source, offset + value.address.offset, make))
            args += [None, *value.like.shape, *value.like.strides]
        elif hasattr(value, "block_shape"):
            return None  # a descriptor of a tensor that is pinned
        else:
            args.append(value)
    return Starter(start, args, tuple(slots))


def _in_c(start: Any) -> Callable[..., None] | None:
    """The launcher in C; where kernels take descriptors it stands behind a function that makes them in Python."""
    if isinstance(start, types.BuiltinFunctionType):
        return start
    names, cells = getattr(start, "__code__", None), getattr(start, "__closure__", None)
    if names is None or cells is None:
        return None
    inner = dict(zip(names.co_freevars, (cell.cell_contents for cell in cells), strict=True)).get("launcher")
    return inner if isinstance(inner, types.BuiltinFunctionType) else None


def _maker(like: Any, meta: dict[str, Any] | None) -> Callable[[int], Any] | None:
    """What makes the copy engine's descriptor of a tensor at an address, as Triton's launcher makes it.

    Args:
        like: descriptor of such a tensor.
        meta: how the kernel reads it; without, it wants no descriptor of the copy engine.
    """
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST
    from triton.runtime import driver

    if meta is None or meta["fp4_padded"]:
        return None
    dtype, fill = TMA_DTYPE_DEVICE_TO_HOST[meta["elem_type"]], driver.active.utils.fill_tma_descriptor
    how = (meta["swizzle"], meta["elem_size"], dtype, list(meta["block_size"]))
    what = (list(like.shape), list(like.strides), 1 if like.padding == "nan" else 0)
    return functools.lru_cache(maxsize=16)(lambda address: fill(address, *how, *what))
