"""Triton's own launcher on a machine without a GPU: kernels are compiled for Hopper, bound and launched by a CUDA driver
that does nothing. What the host pays up to the driver can be measured, and what the driver would get can be looked at.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

__all__ = ["idle_driver", "idle_native", "why_not"]

_SOURCE = r"""
#include "cuda.h"
#include <string.h>
CUresult cuGetErrorString(CUresult e, const char **s) { *s = "idle"; return 0; }
CUresult cuDeviceGet(CUdevice *d, int i) { *d = i; return 0; }
CUresult cuDeviceGetAttribute(int *v, CUdevice_attribute a, CUdevice d) {
  *v = a == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT ? 132 : 232448;
  return 0;
}
CUresult cuCtxGetCurrent(CUcontext *c) { *c = (CUcontext)1; return 0; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) { *c = (CUcontext)1; return 0; }
CUresult cuCtxSetCurrent(CUcontext c) { return 0; }
CUresult cuModuleLoadData(CUmodule *m, const void *image) { *m = (CUmodule)1; return 0; }
static size_t functions = 0;
CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *name) { *f = (CUfunction)(functions += 16); return 0; }
CUresult cuFuncGetAttribute(int *v, CUfunction_attribute a, CUfunction f) {
  *v = a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return 0;
}
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache c) { return 0; }
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v) { return 0; }
CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *c) { *n = 1; return 0; }
CUresult cuCtxGetLimit(size_t *v, CUlimit l) { *v = 0; return 0; }
CUresult cuCtxSetLimit(CUlimit l, size_t v) { return 0; }
CUresult cuPointerGetAttribute(void *v, CUpointer_attribute a, CUdeviceptr p) { *(CUdeviceptr *)v = p; return 0; }
CUresult (*on_launch)(const CUlaunchConfig *, CUfunction, void **) = 0;
CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **args, void **extra) {
  return on_launch ? on_launch(c, f, args) : 0;
}
CUresult cuTensorMapReplaceAddress(CUtensorMap *map, void *address) {
  memcpy(map, &address, 8);
  return 0;
}
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
    const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box, const cuuint32_t *steps,
    CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion l2, CUtensorMapFloatOOBfill fill) {
  char *to = memset(map, 0, sizeof *map);
  memcpy(to, &address, 8);
  to[8] = type, to[9] = swizzle, to[10] = fill, to[11] = rank;
  for (unsigned i = 0; i < rank; i++) {
    unsigned size = sizes[i];
    memcpy(to + 16 + 4 * i, &size, 4);
    memcpy(to + 40 + 4 * i, box + i, 4);
  }
  memcpy(to + 64, strides, 8 * (rank - 1));
  return 0;
}
"""


def why_not() -> str | None:
    """Why there can be no idle driver, or ``None``."""
    if torch.cuda.is_available():
        return "there is a GPU"
    if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
        return "triton must be installed, and compile"
    if shutil.which("gcc") is None:
        return "gcc is not installed"
    return None


@functools.lru_cache(maxsize=1)
def _library() -> Path:
    """The folder of the driver, built and loaded."""
    import triton.backends.nvidia

    folder = Path(tempfile.mkdtemp(prefix="idle-driver-"))
    (folder / "driver.c").write_text(_SOURCE)
    include = Path(triton.backends.nvidia.__file__).parent / "include"
    flags = ["-shared", "-fPIC", "-O1", f"-I{include}", "-Wl,-soname,libcuda.so.1"]
    subprocess.run(["gcc", *flags, "-o", folder / "libcuda.so.1", folder / "driver.c"], check=True)
    ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)  # found by its name from now on
    return folder


@contextlib.contextmanager
def idle_driver() -> Iterator[None]:
    """In this context Triton launches with the idle driver, on tensors of the CPU as if they were on device 0."""
    from triton.runtime import driver

    with mock.patch.dict(os.environ, {"TRITON_LIBCUDA_PATH": str(_library())}):
        made = _active()
        with (
            mock.patch.object(driver, "_active", made),
            mock.patch("dit_accel_kernels.replay._current_device", _zero),
            mock.patch("dit_accel_kernels.replay._current_stream", _zero),
            mock.patch("torch.cuda.is_current_stream_capturing", _no),
        ):
            yield


@contextlib.contextmanager
def idle_native() -> Iterator[Any]:
    """In this context, inside of :func:`idle_driver`, the operator has its body in C for tensors of the CPU."""
    from dit_accel_kernels import native
    from dit_accel_patches import op

    module = native.build()
    native.set_up(module, cuda=ctypes.CDLL("libcuda.so.1"), device=_zero, stream=_zero)
    with mock.patch.object(native, "_known", [native.Native(module, None)]):
        op.take(module, "CPU")
        try:
            yield module
        finally:
            op.leave()


def _zero(*_: int) -> int:
    return 0


def _no() -> bool:
    return False


@functools.lru_cache(maxsize=1)
def _active() -> object:
    from triton.backends.nvidia import driver

    class Idle(driver.CudaDriver):
        def __init__(self) -> None:
            self.utils, self.launcher_cls = driver.CudaUtils(), driver.CudaLauncher
            self.get_device_capability = lambda device=0: (9, 0)
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device=0: 0
            self.set_current_device = lambda device: None

    return Idle()
