"""Reuse, key masks and further keys on a GPU: no host synchronisation, and the same answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from driving import make_run, masked
from torch import Tensor
from torch.nn import functional as F

from dit_accel.adapter import StepInfo
from dit_accel.blend import Blend
from dit_accel.geometry import TokenGeometry
from dit_accel.runtime import ModelRun

pytestmark = pytest.mark.gpu

GEOMETRY = TokenGeometry((5, 24, 20), suffix=37)
STEPS = 10


def _qkv(more: int = 0) -> list[Tensor]:
    gen = torch.Generator(device="cuda").manual_seed(0)
    lengths = (GEOMETRY.tokens, GEOMETRY.tokens + more, GEOMETRY.tokens + more)
    return [torch.randn(2, n, 3, 64, device="cuda", generator=gen).bfloat16() for n in lengths]


def _valid(more: int) -> Tensor:
    valid = torch.ones(2, GEOMETRY.tokens + more, dtype=torch.bool, device="cuda")
    valid[:, 300:700] = False
    valid[:, GEOMETRY.tokens - 9 : GEOMETRY.tokens] = False
    return valid


def _go(run: ModelRun, tensors: list[Tensor], key_valid: Tensor | None) -> Tensor:
    out = tensors[0]
    for step in range(STEPS):
        run.begin_forward(GEOMETRY, StepInfo(step=step, steps=STEPS))
        for layer in range(len(run.layers)):
            out = run.attend(*tensors, layer=layer, scale=None, key_valid=key_valid, dense=masked(key_valid))
    return out


def _run(name: str, **changes: Any) -> ModelRun:
    run = make_run(name, 4, **changes)
    run._eligible.asked = None  # the best kernel of this device
    return run


CASES: list[tuple[str, dict[str, Any], bool, int]] = [
    ("auto", {"reuse": "every:3"}, True, 0),
    ("auto", {"reuse": ("every:2", "leaders:0x2")}, False, 100),
    ("sol", {"reuse": "every:1"}, True, 64),
    ("tidal", {}, False, 0),
    ("recycled", {}, True, 0),
]


@pytest.mark.parametrize(("name", "changes", "mask", "more"), CASES)
def test_no_host_synchronisation(name: str, changes: dict[str, Any], mask: bool, more: int) -> None:
    tensors, valid = _qkv(more), _valid(more) if mask else None
    run = _run(name, density=0.4, **changes)
    run.blends.append(Blend(0.1, {1: [0]}))
    _go(run, tensors, valid)
    run.reset()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _go(run, tensors, valid)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert run.status().sparse_calls > 0


@pytest.mark.parametrize(("name", "changes", "mask", "more"), [case for case in CASES if case[0] != "sol"])
def test_masks_and_further_keys_at_density_one(name: str, changes: dict[str, Any], mask: bool, more: int) -> None:
    tensors, valid = _qkv(more), _valid(more) if mask else None
    out = _go(_run(name, density=1.0, **changes), tensors, valid)
    q, k, v = (x.transpose(1, 2).double() for x in tensors)
    shown = None if valid is None else valid[:, None, None]
    exact = F.scaled_dot_product_attention(q, k, v, attn_mask=shown).transpose(1, 2)
    assert float((out.double() - exact).norm() / exact.norm()) < 1e-2


def test_a_turned_query_is_acted_upon_one_step_later() -> None:
    """The flag comes through pinned memory; runs are repeatable."""
    for _ in range(3):
        run = _run("sol", warmup=0.0, reuse="similar:0.9", density=0.4)
        q, k, v = _qkv()
        turned = q + 6 * F.one_hot(torch.tensor(3, device="cuda"), 64).to(q.dtype)
        straight = q + 6 * F.one_hot(torch.tensor(5, device="cuda"), 64).to(q.dtype)
        for step in range(6):
            run.begin_forward(GEOMETRY, StepInfo(step=step, steps=6))
            query = straight if step < 3 else turned
            run.attend(query, k, v, layer=0, scale=None, key_valid=None, dense=masked(None))
        assert [plan.step for plan in run.ledger.plans] == [0, 4]
