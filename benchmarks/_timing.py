"""Timing by device events, and one long CSV of results."""

from __future__ import annotations

import csv
import datetime
import importlib
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["Result", "Timing", "append_csv", "environment", "measure"]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median and the 20th and 80th percentile."""

    p20_ms: float
    p50_ms: float
    p80_ms: float


@dataclass(frozen=True)
class Result:
    """One line of ``results.csv``; ``ratio_to_cudnn`` is how many times faster than dense cuDNN attention."""

    name: str
    backend: str
    shape: str
    density: float
    p20_ms: float
    p50_ms: float
    p80_ms: float
    tflops: float
    ratio_to_cudnn: float
    gpu: str
    torch: str
    triton: str
    commit: str
    date: str


def _percentiles(samples: list[float]) -> Timing:
    ordered = sorted(samples)
    return Timing(*(ordered[min(len(ordered) - 1, int(len(ordered) * share))] for share in (0.2, 0.5, 0.8)))


def measure(call: Callable[[], Any], device: torch.device, budget_s: float = 0.3) -> Timing:
    """Time a call: warm up, then as many samples as the budget allows, at least 3 and at most 30.

    Short calls are timed several at a time, so that a GPU kernel of 50 us is not hidden behind its launch.

    Args:
        call: what to time.
        device: where it runs; a CPU is timed by the clock.
        budget_s: seconds to spend, warm-up excluded.
    """
    call()
    _wait(device)
    began = time.perf_counter()
    call()
    _wait(device)
    once = max(time.perf_counter() - began, 1e-6)
    each = max(1, min(20, int(2e-3 / once)))
    count = max(3, min(30, int(budget_s / (once * each))))
    if device.type != "cuda":
        samples = []
        for _ in range(count):
            began = time.perf_counter()
            for _ in range(each):
                call()
            samples.append((time.perf_counter() - began) * 1e3 / each)
        return _percentiles(samples)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for start, stop in events:
        start.record()
        for _ in range(each):
            call()
        stop.record()
    _wait(device)
    return _percentiles([start.elapsed_time(stop) / each for start, stop in events])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _version(module: str) -> str:
    try:
        return str(importlib.import_module(module).__version__)
    except ImportError:
        return "none"


def environment(device: torch.device) -> dict[str, str]:
    """What a result depends on: device, versions, commit and date."""
    try:
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": commit,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def append_csv(path: Path, results: list[Result]) -> None:
    """Append results to a CSV, with a header if the file is new."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(Result.__dataclass_fields__))
        if new:
            writer.writeheader()
        writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in asdict(r).items()} for r in results)
