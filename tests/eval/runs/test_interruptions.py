"""`dit-accel eval` as processes: killed at random moments, and two at once. benchmarks/eval_kill.py does more of it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import dit_accel
import dit_accel_eval
import dit_accel_kernels
import dit_accel_patches
from dit_accel_eval.runs.summary import without_times

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
ROOTS = [
    str(Path(m.__file__ or "").parents[1]) for m in (dit_accel, dit_accel_kernels, dit_accel_patches, dit_accel_eval)
]
# The second method plans, which costs more than these few steps allow: its error must survive the kills, too.
OPTIONS = ["--pipeline", str(ROOT / "examples/tiny_wan"), "--method", "gna,union", "--density", "0.8", "--limit", "2"]
OPTIONS += ["--set", "min_tokens=0", "--set", "warmup=0", "--frames", "17", "--steps", "2", "--size", "64x64"]
OPTIONS += ["--metrics", "psnr,ssim", "--no-report", "--no-floor", "--threads", "1"]
SAMPLES, FAILED = 6, 2
KILLS = 3


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(ROOTS), "OMP_NUM_THREADS": "1", **more}


@contextmanager
def started(out: Path, **more: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "dit_accel_eval.cli", "eval", *OPTIONS, "--out", str(out)]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, env=environment(**more), stdout=pipe, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def finished(out: Path, **more: str) -> None:
    with started(out, **more) as process:
        text = process.communicate(timeout=300)[0]
        assert process.returncode == (2 if more.get("RANK", "0") == "0" else 0), text
        assert f"{FAILED} samples failed" in text


def results(out: Path) -> Any:
    return without_times(json.loads((out / "results.json").read_text()))


def records(out: Path) -> list[Path]:
    return sorted(out.glob("samples/*/*.json"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed."""
    out = tmp_path_factory.mktemp("eval") / "whole"
    finished(out)
    assert len(records(out)) == SAMPLES
    assert 0.1 < results(out)["rows"][1]["density"]["run"] < 0.9
    return out


def test_a_run_killed_at_random_ends_the_same(whole: Path, tmp_path: Path) -> None:
    out, generator = tmp_path / "killed", random.Random(7)
    for kill in range(KILLS):
        have = len(records(out))
        with started(out) as process:
            deadline = time.monotonic() + 120
            while len(records(out)) <= have and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            time.sleep(generator.uniform(0, 1.0))
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert len(records(out)) > have, f"kill {kill} lost or gained nothing"
    finished(out)
    assert results(out) == results(whole)
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert names == {path.relative_to(whole).as_posix() for path in whole.rglob("*") if path.is_file()}
    for path in records(whole):
        ours, theirs = (json.loads((folder / path.relative_to(whole)).read_text()) for folder in (out, whole))
        assert without_times(ours) == without_times(theirs)


def test_two_processes_give_the_numbers_of_one(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "two"
    with started(out, RANK="1", WORLD_SIZE="2", LOCAL_RANK="1") as second:
        finished(out, RANK="0", WORLD_SIZE="2", LOCAL_RANK="0")
        second.communicate(timeout=120)
        assert second.returncode == 0
    assert results(out) == results(whole)
