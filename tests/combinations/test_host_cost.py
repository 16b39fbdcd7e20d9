"""What one sparse attention call costs the host beside its kernels, on a plan that is made."""

from __future__ import annotations

import importlib
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import dit_accel.plan
from dit_accel import StepInfo
from dit_accel_patches.handles import enter, leave
from dit_accel_patches.install import Installation

#: Calls of functions, ours and those of torch, on the way from diffusers to the kernels and back; 83 to 90 when written.
MOST_CALLS = 110
#: Microseconds; 24 to 28 when written, and the bar is 60. A busy machine of CI is given twice that.
MOST_TIME = 120.0


@pytest.fixture(params=["adaspa", "auto", "na"])
def attend(request: pytest.FixtureRequest, wan: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The call that diffusers makes, with kernels that do nothing."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    query_mean = importlib.import_module("dit_accel.compensate.query_mean")
    handle = dit_accel.enable(wan.pipe, request.param, min_tokens=0)
    installation = wan.model.__dict__["_dit_accel"]
    assert isinstance(installation, Installation)
    q, k, v = (torch.randn(1, 320, 2, 16) for _ in range(3))
    processor = wan.model.blocks[0].attn1.processor
    previous = enter(processor._dit_accel)
    installation._state.thread = threading.current_thread()
    geometry = installation.adapter.geometry(wan.model, (torch.zeros(1, 4, 5, 16, 16),), {})

    def call() -> Tensor:
        return dispatch_attention_fn(q, k, v, backend=processor._attention_backend)

    for step in range(4):
        installation.run.begin_forward(geometry, StepInfo(step=step, steps=10))
        call()
    out, lse = torch.zeros(1, 320, 2, 16).transpose(1, 2), torch.zeros(1, 2, 320)
    plan = next(iter(installation.run._states.values())).plan
    moved = None
    if plan.key_order is not None:
        heads_first = k.transpose(1, 2), v.transpose(1, 2)
        moved = dit_accel.plan.permute_and_pool(*heads_first, plan.key_order, block=plan.mask.block_k)
    monkeypatch.setattr(dit_accel.plan, "run_backend", lambda *args, **options: (out, lse))
    monkeypatch.setattr(dit_accel.plan, "permute_and_pool", lambda *args, **options: moved)
    monkeypatch.setattr(dit_accel.plan, "permute_tokens", lambda x, order: x)
    monkeypatch.setattr(query_mean, "mean_query_residual", lambda *args, **options: lse)
    monkeypatch.setattr(query_mean, "add_query_means_", lambda out, rows, **options: out)
    before = handle.stats()["transformer"].sparse_calls
    with torch.no_grad():
        call()
        yield call
    assert handle.stats()["transformer"].sparse_calls > before
    leave(previous)
    handle.disable()


def test_functions_called(attend: Callable[[], Tensor]) -> None:
    count = 0

    def watch(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(watch)
    try:
        attend()
    finally:
        sys.setprofile(None)
    print(count)
    assert count <= MOST_CALLS


def test_time(attend: Callable[[], Tensor]) -> None:
    """Of this thread alone, the best of several rounds."""
    best = float("inf")
    for _ in range(8):
        start = time.thread_time_ns()
        for _ in range(100):
            attend()
        best = min(best, (time.thread_time_ns() - start) / 100 / 1e3)
    print(f"{best:.1f} microseconds")
    assert best < MOST_TIME
