"""What ptxas makes of the 8-bit kernel for Hopper: overlapping wgmma fed by descriptors, room for two programs an SM."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# A process of its own: kernels defined under TRITON_INTERPRET=1 cannot be compiled.
SCRIPT = """
import json, os, subprocess, tempfile
import triton
from dit_accel_kernels.aot import _source, _target
from dit_accel_kernels.quantized.triton import AOT_SPECS
ptxas = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "ptxas")
for spec in AOT_SPECS:
    if "plain" not in spec.name or "/d128/" not in spec.name or not spec.name.endswith("/sm_90"):
        continue
    kernel = triton.compile(_source(spec), target=_target("sm_90"), options=dict(spec.options))
    ptx = kernel.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.ptx")
        with open(path, "w") as file:
            file.write(ptx)
        command = [ptxas, "--gpu-name=sm_90a", path, "-o", os.path.join(folder, "kernel.cubin")]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = {"wgmma": "wgmma.mma_async" in ptx, "tma": "cp.async.bulk.tensor" in ptx, "serialized": "C7515" in log}
    found |= {"shuffles": ptx.count("shfl.sync"), "shared": kernel.metadata.shared}
    print(json.dumps({"name": spec.name, **found}))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton to compile its kernels")
def test_hopper_code_overlaps_and_weights_stay_in_registers() -> None:
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
    assert len(seen) == 4
    for kernel in seen:
        assert kernel["wgmma"], kernel
        assert kernel["tma"], kernel
        assert not kernel["serialized"], kernel
        # Two loops, four rounds of two reductions each; a weight that changed lanes would add dozens.
        assert kernel["shuffles"] <= 20, kernel
        assert kernel["shared"] <= 114 << 10, kernel
