"""Every kernel compiles for every GPU it is meant for, fits its shared memory and spills no more than it says."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HAS_TRITON = importlib.util.find_spec("triton") is not None


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that finds the kernels and does not interpret Triton."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT / "kernels")} | environment
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env, check=False)


def test_import_leaves_triton_alone() -> None:
    done = python("-c", "import sys, dit_accel_kernels; assert 'triton' not in sys.modules")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON, reason="needs triton to compile its kernels")
def test_every_kernel_compiles_within_its_limits() -> None:
    done = python("-m", "dit_accel_kernels.aot", "--json", "--jobs", "2")
    results = json.loads(done.stdout) if done.stdout else []
    failed = [f"{r['name']} on {r['target']}: {r['problem']}" for r in results if r["problem"]]
    assert not failed, "\n".join(failed)
    assert done.returncode == 0, done.stderr
    assert {r["target"] for r in results} >= {"sm_80", "sm_90", "sm_100"}


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton to compile its kernels")
def test_interpreted_kernels_are_refused() -> None:
    done = python("-m", "dit_accel_kernels.aot", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "unset TRITON_INTERPRET" in done.stderr


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton to compile its kernels")
def test_a_filter_that_matches_nothing_is_an_error() -> None:
    done = python("-m", "dit_accel_kernels.aot", "--filter", "no such kernel")
    assert done.returncode == 2
    assert "no kernel matches 'no such kernel'" in done.stderr
