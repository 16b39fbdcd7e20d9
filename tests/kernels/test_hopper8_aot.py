"""What ptxas makes of the 8-bit Hopper kernel: the loops spill nothing and run their exponentials under products."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

# A process of its own: kernels defined under TRITON_INTERPRET=1 cannot be compiled.
SCRIPT = r"""
import json, os, re, subprocess, sys, tempfile
import triton
from dit_accel_kernels.aot import _source, _target
from dit_accel_kernels.quantized.hopper8 import AOT_SPECS

tools = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
for spec in AOT_SPECS:
    if not spec.name.endswith(tuple(sys.argv[1:])):
        continue
    kernel = triton.compile(_source(spec), target=_target("sm_90"), options=dict(spec.options))
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = os.path.join(folder, "kernel.ptx"), os.path.join(folder, "kernel.cubin")
        with open(ptx, "w") as file:
            file.write(kernel.asm["ptx"])
        command = [os.path.join(tools, "ptxas"), "-v", "--gpu-name=sm_90a", ptx, "-o", cubin]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        command = [os.path.join(tools, "cuobjdump"), "-sass", cubin]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = [(int(a, 16), text) for a, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)]
    place = {address: i for i, (address, _) in enumerate(lines)}
    loops = []
    for i, (address, text) in enumerate(lines):
        target = re.search(r"\bBRA.*?(0x[0-9a-f]+)", text)
        start = place.get(int(target[1], 16), i) if target else i
        body = [text for _, text in lines[start : i + 1]]
        waits = [j for j, t in enumerate(body) if "DEPBAR.LE gsb0" in t]
        # One step. Waits for barriers that had to be repeated jump into its middle.
        if start < i and len(waits) in (2, 3) and body[0].startswith("BAR.SYNC"):
            between = sum("MUFU.EX2" in t for t in body[waits[0] : waits[-1]])
            loops.append({"between": between} | {n: sum(n in t for t in body) for n in ("GMMA", "VOTE", "STL", "LDL")})
    print(json.dumps({"name": spec.name, "serialized": re.findall(r"C75\d\d", log), "loops": loops}))
"""


def compiled(*names: str) -> list[dict[str, Any]]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(Path(__file__).parents[2] / "kernels")
    run = subprocess.run([sys.executable, "-c", SCRIPT, *names], capture_output=True, text=True, env=env, check=False)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.slow
def test_main_loops_overlap_and_spill_nothing() -> None:
    seen = compiled(*(f"/plain/{kinds}/d128/128x128/bf16" for kinds in ("int8/bf16", "int8/fp8", "fp8/fp8")))
    assert len(seen) == 3
    for kernel in seen:
        assert not kernel["serialized"], kernel
        assert len(kernel["loops"]) == 2, kernel  # one for each consumer
        for loop in kernel["loops"]:
            assert loop["STL"] == loop["LDL"] == 0, kernel
            assert loop["GMMA"] >= 16, kernel
            assert loop["VOTE"] == 1, kernel
            assert loop["between"] >= 60, kernel
