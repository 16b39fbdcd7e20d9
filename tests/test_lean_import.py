"""``import dit_accel`` is cheap: no optional library, no CUDA, and little time beyond torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = (
    "triton",
    "diffusers",
    "transformers",
    "accelerate",
    "torchmetrics",
    "cv2",
    "scipy",
    "matplotlib",
    "xformers",
    "huggingface_hub",
    "dit_accel_patches",
    "dit_accel_eval",
)
PROBE = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.process_time()  # other processes on the machine do not stretch it
import {module}
seconds = time.process_time() - start
print(json.dumps({{
    "seconds": seconds,
    "modules": sorted(set(sys.modules) - before),
    "cuda": torch.cuda.is_initialized(),
}}))
"""


def _probe(module: str) -> dict[str, Any]:
    roots = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "patches", "eval"))
    env = {**os.environ, "PYTHONPATH": roots}
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # what is installed is compiled once
    command = [sys.executable, "-c", PROBE.format(module=module)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def _optional(modules: list[str]) -> set[str]:
    return {name.split(".")[0] for name in modules} & set(HEAVY)


def test_import_is_lean() -> None:
    """No optional library beyond what torch itself brings in, no CUDA, and the best of three under 0.3 s."""
    probes = [_probe("dit_accel") for _ in range(3)]
    assert not _optional(probes[0]["modules"])
    assert not probes[0]["cuda"]
    assert min(probe["seconds"] for probe in probes) < 0.3


@pytest.mark.parametrize("module", ["dit_accel_kernels", "dit_accel.cli"])
def test_other_roots_are_lean(module: str) -> None:
    """The kernels' root and the command line import no optional library either; our own commands may be there."""
    assert not _optional(_probe(module)["modules"]) - {"dit_accel_eval"}
