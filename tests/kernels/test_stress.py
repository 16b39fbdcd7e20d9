"""The stress test's own checks: it finds right calls right, wrong ones wrong, and a worker that hangs."""

from __future__ import annotations

import importlib.util
import queue
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def load(name: str) -> ModuleType:
    """A script as a module."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def calls() -> ModuleType:
    return load("_stress_calls")


@pytest.fixture
def stress(calls: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", list(sys.path))
    return load("stress_kernels")


@pytest.mark.parametrize("seed", range(12))
def test_random_calls_on_the_cpu_are_right(calls: ModuleType, seed: int) -> None:
    variants = calls.VARIANTS["cpu"]
    assert calls.run_call("cpu", variants[seed % len(variants)], seed, CPU, twice=seed % 4 == 0) is None


@pytest.mark.parametrize("kernel", ["mass_hopper", "mass_triton"])
def test_masses_of_every_variant_are_right(calls: ModuleType, kernel: str) -> None:
    for seed, variant in enumerate(calls.VARIANTS[kernel]):
        wide = replace(variant, dtype=torch.float32)
        assert calls.run_call("mass_cpu", wide, seed, CPU, twice=True) is None, variant


def test_the_same_seed_makes_the_same_call(calls: ModuleType) -> None:
    variant = calls.VARIANTS["triton"][6]
    a, b, c = (calls.draw(variant, seed, CPU) for seed in (7, 7, 8))
    assert torch.equal(a.q, b.q)
    assert torch.equal(a.lists.indices, b.lists.indices)
    assert a.q.shape != c.q.shape or not torch.equal(a.q, c.q)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda out, lse: (out + 0.1, lse), "relative error"),
        (lambda out, lse: (out, lse + 0.1), "log-sum-exp differs"),
        (lambda out, lse: (out * torch.nan, lse), "rows without keys are not 0|relative error nan"),
        (lambda out, lse: (out, torch.zeros_like(lse).fill_(-torch.inf)), "other rows are empty"),
    ],
)
def test_wrong_outputs_are_found(calls: ModuleType, monkeypatch: pytest.MonkeyPatch, spoil: Any, message: str) -> None:
    right = calls.run_backend
    monkeypatch.setattr(calls, "run_backend", lambda *args, **given: spoil(*right(*args, **given)))
    found = [calls.run_call("cpu", calls.VARIANTS["cpu"][0], seed, CPU, twice=False) for seed in range(0, 30, 3)]
    assert any(text is not None and any(part in text for part in message.split("|")) for text in found), found


def test_other_bits_in_a_second_run_are_found(calls: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    right, count = calls.run_backend, []

    def drift(*args: Any, **given: Any) -> Any:
        count.append(1)
        out, lse = right(*args, **given)
        return out + 1e-6 * len(count), lse

    monkeypatch.setattr(calls, "run_backend", drift)
    assert "two runs differ" in str(calls.run_call("cpu", calls.VARIANTS["cpu"][0], 3, CPU, twice=True))


class Silent:
    """A worker's process that never says anything."""

    returncode = -9

    def __init__(self) -> None:
        self.killed = False

    def kill(self) -> None:
        self.killed = True

    def wait(self) -> int:
        return -9


def test_a_silent_worker_is_killed_and_its_call_named(stress: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stress, "SILENCE_S", 0.2)
    process = Silent()
    worker = stress.Worker(process, last="try hopper 17", heard=time.monotonic(), said=[])
    right, wrong = stress.watch([worker], queue.Queue(), time.monotonic() + 30)
    assert process.killed
    assert right == 0
    assert "after 'try hopper 17'" in wrong[0]


def test_lines_of_workers_are_counted(stress: ModuleType) -> None:
    lines: queue.Queue[tuple[int, str]] = queue.Queue()
    for line in ("try cpu 1", "ok cpu 1", "try cpu 2", "bad cpu 2 two runs differ", "a warning", ""):
        lines.put((0, line))
    process = Silent()
    process.returncode = 1
    process.wait = lambda: 1  # type: ignore[method-assign]
    worker = stress.Worker(process, heard=time.monotonic(), said=[])
    assert stress.watch([worker], lines, time.monotonic() + 30) == (1, ["bad cpu 2 two runs differ"])
    assert worker.said == ["a warning"]


@pytest.mark.gpu
@pytest.mark.slow
def test_random_calls_on_the_gpu_are_right(stress: ModuleType) -> None:
    assert stress.main(["--count", "300", "--budget", "240"]) == 0
