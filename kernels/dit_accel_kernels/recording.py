"""Writing down the launches of one call, with where each of their addresses comes from.

A recording runs a function as it is, and watches: kernels that are started through :func:`._launch.launch`, tensors
that are allocated, views of them, and tensors that are filled with one value, for which a kernel of ours is put down. All
else that computes or changes a tensor cannot be made again by launches alone; if anything of it is used, the recording says
so and is thrown away. Imports no triton before it has to.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ._launch import here

__all__ = ["Address", "Box", "Launch", "Recording"]

_ALLOCATIONS = frozenset(
    (
        torch.ops.aten.empty.memory_format,
        torch.ops.aten.empty_like.default,
        torch.ops.aten.empty_strided.default,
        torch.ops.aten.new_empty.default,
        torch.ops.aten.new_empty_strided.default,
    )
)
# What a tensor is filled with: the value, or the place of the argument that says it.
_FILLED: dict[Any, tuple[float | None, int]] = {
    torch.ops.aten.ones.default: (1, 0),
    torch.ops.aten.ones_like.default: (1, 0),
    torch.ops.aten.new_ones.default: (1, 0),
    torch.ops.aten.zeros.default: (0, 0),
    torch.ops.aten.zeros_like.default: (0, 0),
    torch.ops.aten.new_zeros.default: (0, 0),
    torch.ops.aten.full.default: (None, 1),
    torch.ops.aten.full_like.default: (None, 1),
    torch.ops.aten.new_full.default: (None, 2),
}
_FILLABLE = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool}
_FILLABLE |= {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
_VALUES = (int, float, str, type(None))


class Address(NamedTuple):
    """An address that differs from call to call: ``offset`` bytes behind the start of a source.

    Attributes:
        source: number of a named tensor, or behind these of an allocation.
        offset: bytes.
    """

    source: int
    offset: int


class Box(NamedTuple):
    """A tensor descriptor whose tensor lies at an :class:`Address`; ``like`` has all else."""

    address: Address
    like: Any


class Launch(NamedTuple):
    """One launch: the compiled kernel, its grid, and all its arguments with addresses left open."""

    compiled: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]


class Recording(TorchDispatchMode):
    """Launches and allocations of what runs in this context, on this thread.

    Args:
        named: addresses of the tensors that may be elsewhere another time, 0 where there is none. Of several at one address
            the first stands for all.
        moving: of these the tensors that are elsewhere at every call.

    Attributes:
        launches: what was started.
        made: tensors that were allocated; their numbers as sources follow those of the named ones.
        pinned: tensors that were used, neither named nor allocated here; what was recorded holds for them alone.
        failure: why this is no complete account, or ``None``.
    """

    def __init__(self, named: Sequence[int], moving: Sequence[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches: list[Launch] = []
        self.made: list[Tensor] = []
        self.pinned: list[Tensor] = []
        self.failure: str | None = None
        self._sources: dict[int, int] = {}
        for source, address in enumerate(named):
            if address:
                self._sources.setdefault(address, source)
        self._first = len(named)
        self._moving = {_storage(x) for x in moving}
        self._places: dict[int, int] = {}
        self._computed: dict[int, Tensor] = {}  # kept, lest their memory serves somebody else
        self._starts = False

    def __enter__(self) -> Recording:
        super().__enter__()  # type: ignore[no-untyped-call]
        here.recording = self
        return self

    def __exit__(self, *error: Any) -> None:
        here.recording = None
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._starts:  # a compiler or an interpreter of kernels computes something of its own
            return result
        if func._schema.is_mutable:
            self._fail(f"{func} changes a tensor")
        elif func in _ALLOCATIONS:
            if result.numel():
                self._allocate(result)
        elif func in _FILLED and _fillable(result):
            value, place = _FILLED[func]
            self._allocate(result)
            self._fill(result, args[place] if value is None else value)
        else:
            self._note(func, result, args, kwargs)
        return result

    def start(self, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> Any:
        """Start a kernel and write it down."""
        self._starts = True
        try:
            compiled = kernel[grid](*args, **options)
        finally:
            self._starts = False
        if kernel.pre_run_hooks or not isinstance(grid, tuple):
            self._fail(f"{kernel} has hooks, or a grid that is computed")
        given = dict(zip(kernel.arg_names, args, strict=False)) | options
        defaults = _defaults(kernel.fn)
        values = [given[name] if name in given else defaults[name] for name in kernel.arg_names]
        self.launches.append(Launch(compiled, grid, tuple(self._open(value) for value in values)))
        return compiled

    def address(self, x: Tensor) -> Address | None:
        """Where the address of a tensor comes from; ``None``, and it is pinned, if from nowhere that changes."""
        found = self._sources.get(x.data_ptr())
        if found is not None:
            return Address(found, 0)
        place = _storage(x)
        if place in self._computed:
            self._fail("a kernel reads what torch has computed")
        if place in self._moving:
            self._fail("a kernel reads a part of a tensor that moves")
        if place not in self._places:
            self.pinned.append(x)
            return None
        return Address(self._places[place], x.data_ptr() - place)

    def _allocate(self, x: Tensor) -> None:
        """Note a tensor that is new."""
        self._places[_storage(x)] = self._first + len(self.made)
        self.made.append(x)

    def _fill(self, x: Tensor, value: float) -> None:
        """Fill a tensor once more, by a kernel that can be started again."""
        from .fills.triton import FILL_BLOCK, fill_kernel

        count, flat = x.numel(), x.view(torch.uint8) if x.dtype == torch.bool else x
        value = float(value) if x.is_floating_point() else int(value)
        grid = (-(-count // FILL_BLOCK),)
        self.start(fill_kernel, grid, flat, count, VALUE=value, BLOCK=FILL_BLOCK, num_warps=4)

    def _open(self, value: Any) -> Any:
        """An argument with its address left open."""
        if isinstance(value, Tensor):
            if not value.numel():
                return 0  # a view without elements has no address, wherever it was cut from
            found = self.address(value)
            return value.data_ptr() if found is None else found
        base = getattr(value, "base", None)
        if isinstance(base, Tensor):
            found = self.address(base)
            return value if found is None else Box(found, value)
        if not isinstance(value, _VALUES):
            self._fail(f"an argument of a kernel is {type(value).__name__}")
        return value

    def _note(self, func: Any, result: Any, args: Any, kwargs: Any) -> None:
        """Note what torch has computed: harmless if nobody uses it, as views are."""
        before = {_storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(result):
            if not isinstance(x, Tensor):
                self._fail(f"{func} gives the host a value")
            elif x.numel() and _storage(x) not in before:
                self._computed[_storage(x)] = x

    def _fail(self, reason: str) -> None:
        self.failure = self.failure or reason


def _fillable(x: Tensor) -> bool:
    """Whether a kernel can fill a new tensor."""
    return bool(x.numel()) and x.is_contiguous() and x.dtype in _FILLABLE


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


@functools.lru_cache(maxsize=256)
def _defaults(function: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
