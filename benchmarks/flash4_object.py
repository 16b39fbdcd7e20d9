"""flash-attn-4's block-sparse kernels compiled ahead of time: 250 KB where its compiler takes 260 MB.

    python benchmarks/flash4_object.py export flash4.so   # flash-attn-4 and nvidia-cutlass-dsl[cu13] installed, no GPU
    FLASH4_OBJECT=flash4.so python benchmarks/kernels.py  # apache-tvm-ffi (2.7 MB) and a Hopper GPU

The first command needs ``g++`` and compiles what ``flash_attn.cute.interface`` itself would for bf16, head sizes 64 and
128, blocks of 128 by 128 on 132 multiprocessors, by the export that its cache of compiled kernels uses; lengths and
strides stay open. What the second calls is therefore that library's own kernel, without the Python around it.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["export", "object_call", "why_no_object"]

VARIABLE = "FLASH4_OBJECT"
_BLOCK = 128
_HEAD_SIZES = (64, 128)
# Only called when a launch fails; the original is in a library of 43 MB.
_ERRORS = """
#include <stdio.h>
extern void TVMFFIErrorSetRaisedFromCStr(const char*, const char*);
void CuteDSLRT_TVMFFISetRaisedCudaError(int error) {
    char text[64];
    snprintf(text, sizeof text, "CUDA error %d", error);
    TVMFFIErrorSetRaisedFromCStr("RuntimeError", text);
}
"""


def why_no_object(head_dim: int, dtype: torch.dtype, tokens: int) -> str | None:
    """Say why there is no compiled kernel for a call, or return ``None``."""
    if not os.environ.get(VARIABLE):
        return f"{VARIABLE} is not set"
    if importlib.util.find_spec("tvm_ffi") is None:
        return "apache-tvm-ffi is not installed"
    if dtype != torch.bfloat16 or head_dim not in _HEAD_SIZES or tokens % _BLOCK:
        return f"compiled for bfloat16, head sizes {_HEAD_SIZES}, multiples of {_BLOCK} tokens"
    return None


def object_call(q: Tensor, k: Tensor, v: Tensor, count: Tensor, ids: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    """A call of the compiled kernel, whose output and log-sum-exp are allocated once.

    Args:
        q: ``[B, H, S, D]``, bfloat16, views of ``[B, S, H, D]`` or not.
        k: like ``q``.
        v: like ``q``.
        count: int32 ``[B, H, S/128]``, blocks that a query block visits.
        ids: int32 ``[B, H, S/128, S/128]``, these blocks.
    """
    batch, heads, tokens, dim = q.shape
    kernel = getattr(_module(os.environ[VARIABLE]), f"func_sparse{dim}")
    none = torch.zeros_like(count)
    views = [x.transpose(1, 2) for x in (q, k, v)]
    out = torch.empty(batch, tokens, heads, dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, tokens, device=q.device)
    # The two empty pairs: variable lengths, used lengths; then page table, window, sink; last, scheduler metadata.
    blocks = (none, ids, count, ids, None, None, None, None)
    args = (*views, out, lse, dim**-0.5, *(None,) * 8, blocks, (None, None), None, None)

    def call() -> tuple[Tensor, Tensor]:
        kernel(*args)
        return out.transpose(1, 2), lse

    return call


@lru_cache(maxsize=1)
def _module(path: str) -> Any:
    torch.cuda.init()
    loaded = Path("/proc/self/maps").read_text(encoding="utf-8").split()
    # The object finds the runtime of CUDA among the global symbols; torch loads it without making them global.
    ctypes.CDLL(next(name for name in loaded if "libcudart.so" in name), mode=ctypes.RTLD_GLOBAL)
    return importlib.import_module("tvm_ffi").load_module(str(Path(path).resolve()))


def export(path: Path) -> None:
    """Compile the kernels and link them into ``path``; needs no GPU."""
    os.environ |= {"FLASH_ATTENTION_ARCH": "sm_90", "FLASH_ATTENTION_NUM_SMS": "132", "CUTE_DSL_ARCH": "sm_90a"}
    import nvidia_cutlass_dsl

    roots = [Path(root) for root in nvidia_cutlass_dsl.__path__]
    sys.path[:0] = [str(root / "dsl_packages") for root in roots]
    runtime = next(found for root in roots for found in root.rglob("libcuda_dialect_runtime_static.a"))
    with tempfile.TemporaryDirectory() as folder:
        objects = []
        for dim in _HEAD_SIZES:
            objects.append(f"{folder}/{dim}.o")
            _compiled(dim).export_to_c(object_file_path=objects[-1], function_name=f"func_sparse{dim}")
        Path(folder, "errors.c").write_text(_ERRORS, encoding="utf-8")
        subprocess.run(["cc", "-O1", "-fPIC", "-c", f"{folder}/errors.c", "-o", f"{folder}/errors.o"], check=True)
        partial = path.with_suffix(".partial")
        command = ["g++", "-shared", "-s", "-o", str(partial), *objects, f"{folder}/errors.o", str(runtime)]
        subprocess.run(command, check=True)
        partial.replace(path)


def _compiled(dim: int) -> Any:
    """What flash-attn-4 compiles for a head size, from tensors without memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    interface = importlib.import_module("flash_attn.cute.interface")
    sparse = importlib.import_module("flash_attn.cute.block_sparsity").BlockSparseTensorsTorch
    blocks = 8
    with FakeTensorMode():
        q = torch.empty(1, blocks * _BLOCK, 2, dim, dtype=torch.bfloat16, device="cuda")
        count = torch.empty(1, 2, blocks, dtype=torch.int32, device="cuda")
        ids = torch.empty(1, 2, blocks, blocks, dtype=torch.int32, device="cuda")
        lists = sparse(count, ids, count, ids, block_size=(_BLOCK, _BLOCK))
        interface._flash_attn_fwd(
            q, q, q, softmax_scale=dim**-0.5, block_sparse_tensors=lists, return_lse=True
        )  # fmt: skip
    return list(interface._flash_attn_fwd.compile_cache.cache.values())[-1]


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] != "export":
        raise SystemExit("usage: flash4_object.py export PATH")
    export(Path(sys.argv[2]))
