"""Kernels compiled for sm_90 and taken apart again, for tests of what ptxas makes of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["compiled"]

# For each spec of a module: ``log`` of ptxas, ``lines`` of SASS as (address, text), and ``bodies``: the instructions of
# each loop, or from where any other jump backwards leads, with the places of waits for products among them. ``counted``
# counts instructions by name.
_FRONT = r"""
import importlib, json, os, re, subprocess, sys, tempfile
import triton
from dit_accel_kernels.aot import _source, _target
AOT_SPECS = importlib.import_module(sys.argv[1]).AOT_SPECS

tools = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
for spec in AOT_SPECS:
    if not spec.name.endswith(tuple(sys.argv[2:])):
        continue
    kernel = triton.compile(_source(spec), target=_target("sm_90"), options=dict(spec.options))
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = os.path.join(folder, "kernel.ptx"), os.path.join(folder, "kernel.cubin")
        with open(ptx, "w") as file:
            file.write(kernel.asm["ptx"])
        options = spec.options.get("ptx_options", "").split()
        command = [os.path.join(tools, "ptxas"), "-v", *options, "--gpu-name=sm_90a", ptx, "-o", cubin]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        command = [os.path.join(tools, "cuobjdump"), "-sass", cubin]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = [(int(a, 16), text) for a, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)]
    place, bodies = {address: i for i, (address, _) in enumerate(lines)}, []
    for i, (_, text) in enumerate(lines):
        target = re.search(r"\bBRA.*?(0x[0-9a-f]+)", text)
        start = place.get(int(target[1], 16), i) if target else i
        if start < i:
            body = [text for _, text in lines[start : i + 1]]
            bodies.append((body, [j for j, t in enumerate(body) if "DEPBAR.LE gsb0" in t]))

    def counted(body, *names):
        return {name: sum(name in text for text in body) for name in names}
"""


def compiled(module: str, look: str, *names: str) -> list[dict[str, Any]]:
    """What ``look``, a piece of code within the loop over specs, prints of each as a line of JSON.

    In a process of its own: kernels defined under ``TRITON_INTERPRET=1`` cannot be compiled.

    Args:
        module: dotted name of the module with ``AOT_SPECS``.
        look: code, indented by four spaces.
        names: endings of the names of specs.
    """
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(Path(__file__).parents[2] / "kernels")
    command = [sys.executable, "-c", _FRONT + look, module, *names]
    run = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]
