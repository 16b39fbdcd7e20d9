"""Launches of many kinds of plans from C: what Triton's launchers launch for the same tensors."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dit_accel.plan import execute_with_lse
from dit_accel_kernels.native.packing import Form, make_call
from dit_accel_patches import op
from tests.kernels.in_c import in_c, started
from tests.kernels.launches import Log, agree, same_form
from tests.methods.test_replayed import log, needs_idle, plan_of, tensors
from tests.methods.test_replayed_kinds import _eight_bit

__all__ = ["log"]  # a fixture

# Poison is written by an operation of torch, which no recording lets pass.
pytestmark = [pytest.mark.no_poison, needs_idle]

NUMBER = 5000  # no layer has it
PLANS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "auto": ("auto", "hopper", {"order": "gilbert"}),
    "union": ("union", "hopper", {}),
    "radial": ("radial", "hopper", {}),
    "portable": ("adaspa", "triton", {"block_q": 64, "block_k": 64}),
    "8 bit": ("adaspa", "hopper", {"precision": "int8_fp8"}),
    "filled": ("union", "hopper", {"precision": "int8_fp8"}),
}


@pytest.fixture
def module(log: Log) -> Iterator[Any]:
    with in_c() as made, torch.no_grad():
        yield made
        made.set_body(op._attend)


@pytest.mark.parametrize("what", PLANS)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_launches(module: Any, what: str, scale: float | None) -> None:
    name, backend, options = PLANS[what]
    plan = plan_of(name, **options)
    with _eight_bit(backend) if "precision" in options else contextlib.nullcontext():
        for seed in range(2):
            execute_with_lse(plan, *tensors(seed), scale=scale, key_valid=None, backend=backend, want_lse=False)
    assert plan.replays is not None
    (launches,) = plan.replays.replays._bound.values()
    q, k, v = (x.transpose(1, 2) for x in tensors(2))
    form = Form(tuple(q.shape), (q.stride(), k.stride(), v.stride()), q.dtype, q.device)
    call = make_call(module, launches, form, scale, ())
    assert call is not None
    module.set_body(functools.partial(pytest.fail, "the call went to Python"))
    with started(launches.program.kernels) as theirs:
        launches.like(q, (q, k, v))
    module.arm(NUMBER, call, None)
    with started(launches.program.kernels) as mine:
        module.attend(q, k, v, torch.tensor(NUMBER), None, scale, False, False)
    assert module.disarm(NUMBER, call) == 1
    assert len(theirs) == len(launches.program.starters)
    wanted, found = same_form(theirs, q, k, v), same_form(mine, q, k, v)
    assert agree(found, wanted)
    assert agree(wanted, found)
