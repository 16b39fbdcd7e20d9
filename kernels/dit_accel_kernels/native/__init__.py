"""Sparse calls with nothing left to decide, carried out by a small piece of C (``again.c``) in place of Python.

It is built at first use, with the compiler that Triton builds its own launchers with, and kept in Triton's cache. It reads
tensors through the C interface that torch keeps stable for compiled models. Where any of that is missing, or the self-test
fails, :func:`why_not` says why, and calls go through Python as they do otherwise.
"""

from __future__ import annotations

import ctypes
import sys
import sysconfig
import threading
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

__all__ = ["Native", "build", "is_made", "launch_hooks", "native", "set_up", "why_not"]

_NAME = "dit_accel_again"
_READS = ("get_data_ptr", "get_dim", "get_sizes", "get_strides", "get_dtype", "get_device_type", "get_device_index")
_OF_TORCH = (*_READS, "empty_strided", "delete_tensor_object")
_OF_CUDA = ("cuLaunchKernelEx", "cuTensorMapReplaceAddress", "cuGetErrorString", "cuCtxGetCurrent")


class Native(NamedTuple):
    """The module in C, or why there is none."""

    module: Any
    reason: str | None


_lock = threading.Lock()
_known: list[Native] = []  # what was found out, once it was


def native() -> Any:
    """The module in C, built and tested at the first call; ``None`` if there is none, see :func:`why_not`."""
    return _native().module


def is_made() -> bool:
    """Whether :func:`native` answers without building or testing anything."""
    return bool(_known)


def why_not() -> str | None:
    """Why there is no module in C on this machine, or ``None``."""
    return _native().reason


def launch_hooks() -> tuple[list[Any], list[Any]]:
    """Who waits for Triton's launches: lists that change when somebody begins or ends to."""
    from triton import knobs

    return knobs.runtime.launch_enter_hook.calls, knobs.runtime.launch_exit_hook.calls


def _native() -> Native:
    with _lock:
        if not _known:
            _known.append(_found())
        return _known[0]


def _found() -> Native:
    reason = _why_not_here()
    if reason is not None:
        return Native(None, reason)
    try:
        module = build()
        set_up(module)
    except Exception as error:  # whatever a compiler or a library of another version says
        return Native(None, f"{type(error).__name__}: {error}".splitlines()[0])
    from .self_test import self_test

    reason = self_test(module)
    return Native(module if reason is None else None, reason)


def _why_not_here() -> str | None:
    if sys.platform != "linux":
        return f"made for Linux, not {sys.platform}"
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return "made for Python with its global lock"
    if torch.version.hip is not None or not torch.cuda.is_available():
        return "needs an NVIDIA GPU"
    if not hasattr(torch.compiler, "_is_compiling_flag"):
        return f"torch {torch.__version__} does not say that it compiles in the way known here"
    return None


def build() -> ModuleType:
    """The module, from Triton's cache or compiled into it; :func:`set_up` comes next.

    Raises:
        RuntimeError: there is no C compiler.
        ImportError: there is no Triton with a launcher for NVIDIA GPUs.
        subprocess.CalledProcessError: the compiler fails.
    """
    import triton.backends.nvidia
    from triton.runtime.build import compile_module_from_src

    include = Path(triton.backends.nvidia.__file__).parent / "include"
    source = Path(__file__).with_name("again.c").read_text()
    # Triton keeps it under the text alone, and another Python has another interface.
    tagged = f"/* {sys.implementation.cache_tag} */\n{source}"
    made: ModuleType = compile_module_from_src(src=tagged, name=_NAME, include_dirs=[str(include)])
    return made


def set_up(module: Any, *, cuda: Any = None, device: Any = None, stream: Any = None) -> None:
    """Tell the module what it calls, and see that it reads tensors as they are.

    Args:
        module: of :func:`build`.
        cuda: library of the driver, that of CUDA if ``None``.
        device: says the current device, torch's if ``None``.
        stream: says the current stream of a device, torch's if ``None``.

    Raises:
        AttributeError: torch or the driver lack a function.
        OSError: there is no such library.
        RuntimeError: tensors are read wrongly: torch has another binary interface.
    """
    of_torch = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    of_cuda = ctypes.CDLL("libcuda.so.1") if cuda is None else cuda
    functions = [getattr(of_torch, f"aoti_torch_{name}") for name in _OF_TORCH]
    functions += [getattr(of_cuda, name) for name in _OF_CUDA]
    addresses = tuple(ctypes.cast(function, ctypes.c_void_p).value for function in functions)
    core: Any = torch._C
    objects = (
        torch.Tensor,
        torch.empty_like,
        core._cuda_getDevice if device is None else device,
        core._cuda_getCurrentRawStream if stream is None else stream,
        core._len_torch_dispatch_stack,
        torch.is_grad_enabled,
        vars(torch.compiler),
    )
    number = torch.tensor(0, device="cpu")
    module.setup(addresses, objects, number)
    x = torch.empty(2, 3, 5, 7, dtype=torch.float16, device="cpu").transpose(1, 2)[:, 1:]
    read, whole = module.describe(x), module.describe(number)
    if read[:3] != (tuple(x.shape), x.stride(), x.data_ptr()) or whole[:2] != ((), ()) or read[4:] != whole[4:]:
        raise RuntimeError(f"torch {torch.__version__} lays out tensors otherwise than known here")
