"""Models spread over two processes compute what one process does.

One test for many scenarios: starting two processes takes longer than a scenario, and workers of xdist share no fixtures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import parallel_worker
import pytest
import torch
import torch.multiprocessing as mp
from parallel_worker import CORE, SCENARIOS

#: Matrix products of half as many tokens round otherwise where the library cuts them otherwise.
ROUNDING = 2e-6
REFUSED = "wan proxy"


def two_processes(folder: Path, names: list[str]) -> list[dict[str, Any]]:
    """What each process found, by scenario: alone, and spread."""
    mp.spawn(parallel_worker.run_all, (str(folder), names), nprocs=parallel_worker.SIZE)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(parallel_worker.SIZE)]


def check(results: list[dict[str, Any]], name: str) -> None:
    for found in results:
        alone, spread = found[name]
        assert not isinstance(spread, str), (name, spread)
        error = (alone["out"] - spread["out"]).abs().max()
        assert error <= ROUNDING * alone["out"].abs().max(), (name, error)
        for key in ("density", "sparse_density", "calls", "sparse_calls", "reasons", "density_by_step", "plans"):
            assert getattr(spread["status"], key) == pytest.approx(getattr(alone["status"], key), rel=1e-6), (name, key)
        for ours, theirs in zip(spread["status"].layers, alone["status"].layers, strict=True):
            assert ours.head_density == pytest.approx(theirs.head_density, rel=1e-6), name
            assert ours.orders == theirs.orders, name
        assert spread["restored"], name
        assert (spread["after"] - alone["after"]).abs().max() <= ROUNDING * alone["after"].abs().max(), name
    first, second = (found[name][1]["out"] for found in results)
    assert torch.equal(first, second), name


def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    results = two_processes(tmp_path, list(CORE))
    for name in CORE:
        check(results, name)
        assert results[0][name][1]["status"].sparse_calls > 0
    for found in results:
        alone, spread = found["wan auto"]
        assert torch.equal(alone["out"], spread["out"])
        # Heads of equal work stay where they are, others are dealt out anew.
        assert spread["moved"] == 0
        assert found["wan five heads top_p"][1]["moved"] > 0


@pytest.mark.slow
def test_more_models_and_methods(tmp_path: Path) -> None:
    names = [name for name in SCENARIOS if name not in CORE]
    results = two_processes(tmp_path, names)
    for name in names:
        if name != REFUSED:
            check(results, name)
    for found in results:
        for name in names:
            # What was asked for as a ring says what is done instead, and nothing else does.
            told = [note for note in found[name][1]["status"].notes if "no ring is run" in note]
            assert len(told) == ("ring" in name), name
        status = found[REFUSED][1]["status"]
        assert status.sparse_calls == 0
        assert any("proxy" in reason and "mass" in reason for reason in status.reasons)
