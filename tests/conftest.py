"""Ground rules of every test: no network, fixed seeds, one thread a worker, and memory that is NaN until written."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable
from typing import Any

# Before torch, triton and Hugging Face libraries are imported: they read these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("MKL_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

HAS_GPU = torch.cuda.is_available()
# Triton reads this once, when a kernel is defined, so it is a choice for the whole process. With it, Triton becomes usable
# on the CPU and would be chosen everywhere, slowly: `make test` gives the tests marked `interpreter` a run of their own.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, with the reason."""
    no_gpu = pytest.mark.skip(reason="needs a CUDA or ROCm device")
    not_interpreted = pytest.mark.skip(reason="needs TRITON_INTERPRET=1 from the start of the process")
    for item in items:
        if "gpu" in item.keywords and not HAS_GPU:
            item.add_marker(no_gpu)
        if "interpreter" in item.keywords and not INTERPRETED:
            item.add_marker(not_interpreted)


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def _poisoned(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Fill what ``original`` allocates with NaN if one of our packages asked for it."""

    def allocate(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = original(*args, **kwargs)
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return out
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("dit_accel") and out.dtype.is_floating_point and out.device.type != "meta":
            out.fill_(float("nan"))
        return out

    return allocate


@pytest.fixture(autouse=True)
def poison_empty(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """An output that is returned was written: uninitialised memory reads as NaN in our packages."""
    if request.node.get_closest_marker("no_poison") is None:
        for name in ("empty", "empty_like", "empty_strided"):
            monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
        for name in ("new_empty", "new_empty_strided"):
            monkeypatch.setattr(torch.Tensor, name, _poisoned(getattr(torch.Tensor, name)))


@pytest.fixture
def device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if HAS_GPU else "cpu")
