"""What the operator's body in C asks the driver to launch, on a machine without a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dit_accel_kernels.native.packing import types_of

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from _idle_driver import idle_native as in_c

__all__ = ["Started", "in_c", "started"]

Started = list[tuple[Any, ...]]
_SIZES = {f"{sign}int{bits}_t": bits // 8 for sign in ("", "u") for bits in (8, 16, 32, 64)}
_SIZES |= {"CUdeviceptr": 8, "CUtensorMap": 128, "double": 4}  # of the floats that are passed, all are 32 bit


class _Config(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in ("x", "y", "z", "bx", "by", "bz", "shared")]
    _fields_ += [("stream", ctypes.c_void_p), ("attrs", ctypes.c_void_p), ("count", ctypes.c_uint32)]


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Config), ctypes.c_uint64, ctypes.POINTER(ctypes.c_void_p))


@contextlib.contextmanager
def started(kernels: Any) -> Iterator[Started]:
    """In this context what the driver is asked to launch is listed: function, grid, how, and each argument.

    Args:
        kernels: Triton's compiled kernels, which know the types of their arguments.
    """
    found: Started = []
    kinds = {kernel.function: [kind for kind in types_of(kernel) if kind != "constexpr"] for kernel in kernels}

    def on_launch(config: Any, function: int, params: Any) -> int:
        how, attrs = config.contents, []
        for i in range(how.count):
            raw = ctypes.string_at(how.attrs + 72 * i, 72)
            attrs.append((raw[:4], raw[8:20]))
        values = [_value(kind, params[i]) for i, kind in enumerate([*kinds[function], "*", "*"])]
        grid = how.x, how.y, how.z, how.bx, how.by, how.bz, how.shared, how.stream or 0
        found.append((function, grid, tuple(attrs), *values))
        return 0

    library, callback = ctypes.CDLL("libcuda.so.1"), _Callback(on_launch)
    where = ctypes.c_void_p.in_dll(library, "on_launch")
    where.value = ctypes.cast(callback, ctypes.c_void_p).value
    try:
        yield found
    finally:
        where.value = None


def _value(kind: str, at: int) -> Any:
    size = _size(kind)
    raw = ctypes.string_at(at, size)
    return (int.from_bytes(raw[:8], "little"), raw[8:]) if size == 128 else int.from_bytes(raw, "little")


@functools.cache
def _size(kind: str) -> int:
    from triton.backends.nvidia.driver import ty_to_cpp

    return _SIZES[ty_to_cpp(kind)]
