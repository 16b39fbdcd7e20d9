"""Groups of GPU cases, each in a process of its own: a kernel that hangs or breaks the context takes nothing else along."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_in_a_process(script: str, *arguments: str, limit: float) -> tuple[bool, str]:
    """Run a test file as a script, at most ``limit`` seconds; whether it passed, and the end of what it said."""
    command = [sys.executable, str(Path(script).resolve()), *arguments]
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = f"{ROOT}:{ROOT / 'kernels'}"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=env, check=False)
    except subprocess.TimeoutExpired as late:
        said = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        return False, f"still running after {limit:.0f} s (hang?); last lines:\n{said[-1500:]}"
    return done.returncode == 0, (done.stdout + done.stderr)[-3000:]
