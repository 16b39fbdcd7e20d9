"""What ptxas makes of the kernel for Hopper: asynchronous wgmma fed by descriptors, and room for two programs an SM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# A process of its own: kernels defined under TRITON_INTERPRET=1 cannot be compiled.
SCRIPT = """
import importlib, json, os, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
module = importlib.import_module("dit_accel_kernels.block_sparse.triton")
ptxas = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "ptxas")
for spec in module.AOT_SPECS:
    if not spec.name.endswith(("/bf16/sm_90", "/fp16/sm_90")):
        continue
    names = list(spec.signature)
    source = ASTSource(
        fn=spec.fn,
        signature=spec.signature,
        constexprs={(names.index(name),): value for name, value in spec.constexprs.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in spec.divisible_by_16},
    )
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=spec.options)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.ptx")
        with open(path, "w") as file:
            file.write(kernel.asm["ptx"])
        command = [ptxas, "--gpu-name=sm_90a", path, "-o", os.path.join(folder, "kernel.cubin")]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    ptx = kernel.asm["ptx"]
    found = {"wgmma": "wgmma.mma_async" in ptx, "tma": "cp.async.bulk.tensor" in ptx, "serialized": "C7515" in log}
    print(json.dumps({"name": spec.name, "shared": kernel.metadata.shared, **found}))
"""


@pytest.mark.slow
def test_hopper_code_overlaps_and_leaves_room_for_two_programs() -> None:
    kernels = Path(__file__).parents[2] / "kernels"
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(kernels)!r})\n{SCRIPT}"],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        check=False,
    )
    assert run.returncode == 0, run.stderr
    seen = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(seen) > 8
    for kernel in seen:
        assert kernel["wgmma"], kernel
        assert kernel["tma"], kernel
        assert not kernel["serialized"], kernel
        assert kernel["shared"] <= (114 << 10) or "/d256/" in kernel["name"], kernel
