"""Calls with a mask of keys, and in 8 bit, as launches alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import dit_accel.plan
from dit_accel.plan import Plan, execute_with_lse
from dit_accel_kernels.recording import Recording
from tests.kernels.launches import Log, agree, same_form
from tests.methods.test_replayed import (
    DIM,
    GRID,
    Counted,
    Kept,
    counted,
    log,
    needs_idle,
    on_gpu,
    plan_of,
    stays,
    tensors,
    usual,
)

__all__ = ["counted", "log"]  # fixtures

# Poison is written by an operation of torch, which no recording lets pass.
pytestmark = pytest.mark.no_poison


def mask_of(seed: int, batch: int = 1, device: str = "cpu") -> Tensor:
    """Valid keys ``[B, S]``: some are hidden behind, others anywhere."""
    gen = torch.Generator().manual_seed(seed)
    valid = torch.rand(batch, GRID.tokens, generator=gen) > 0.1
    valid[:, GRID.tokens - 5 * seed - 3 :] = False
    return valid.to(device)


def masked(plan: Plan, qkv: Any, valid: Tensor, backend: str = "hopper") -> tuple[Tensor, Tensor | None]:
    return execute_with_lse(plan, *qkv, scale=None, key_valid=valid, backend=backend, want_lse=True)


def usual_masked(plan: Plan, qkv: Any, valid: Tensor, backend: str = "hopper") -> tuple[Tensor, Tensor | None]:
    whole: Any = dit_accel.plan._execute_whole
    return whole(*qkv, plan, valid, DIM**-0.5, backend, True)


@needs_idle
@pytest.mark.parametrize(
    ("name", "options"), [("adaspa", {}), ("auto", {"order": "gilbert"}), ("union", {"order": "gilbert"})]
)
def test_masked_launches_are_those_of_the_usual_way(
    log: Log, counted: Counted, name: str, options: dict[str, Any]
) -> None:
    plan = plan_of(name, **options)
    for seed in range(4):
        qkv, valid = tensors(seed), mask_of(seed)
        usual_masked(plan, qkv, valid)
        log.clear()
        with Kept():
            usual_masked(plan, qkv, valid)
        wanted = same_form(log, *qkv, *stays(plan))
        log.clear()
        masked(plan, qkv, valid)
        assert agree(same_form(log, *qkv, *stays(plan)), wanted)
    assert counted.runs == 4 * 2 + 1


@needs_idle
def test_a_mask_is_told_from_none(log: Log, counted: Counted) -> None:
    plan, qkv = plan_of("adaspa"), tensors()
    for _ in range(3):
        masked(plan, qkv, mask_of(0))
        execute_with_lse(plan, *qkv, scale=None, key_valid=None, backend="hopper", want_lse=True)
    assert counted.runs == 2


@contextlib.contextmanager
def _eight_bit(backend: str) -> Iterator[None]:
    """In this context quantised calls of the CPU are served as on a Hopper GPU."""
    patches: dict[str, Any] = {
        "dit_accel_kernels.quantized.choose": lambda **where: (backend, {}),
        "dit_accel_kernels.quantized.launch._arch": lambda device: "sm_90",
        "dit_accel_kernels.quantized.hopper8_launch.multiprocessors": lambda device: 132,
        "dit_accel_kernels.quantize.launch.capability": lambda x: 90,
        "dit_accel_kernels.quantize._triton_reason": lambda *args: None,
        "dit_accel_kernels.quantize.resolve_backend": lambda asked, x: "triton",
        "dit_accel_kernels._launch.capability": lambda x: 90,
    }
    with contextlib.ExitStack() as stack:
        for name, function in patches.items():
            stack.enter_context(mock.patch(name, function))
        yield


@needs_idle
@pytest.mark.parametrize(
    ("name", "precision", "backend", "fills"),
    [("adaspa", "int8_fp8", "hopper", 0), ("adaspa", "int8", "hopper", 1), ("union", "int8_fp8", "hopper", 1)],
)
def test_launches_in_8_bit(log: Log, counted: Counted, name: str, precision: str, backend: str, fills: int) -> None:
    """What torch fills is filled by one launch more each."""
    plan = plan_of(name, precision=precision)
    assert plan.precision is not None
    with _eight_bit(backend):
        for seed in range(3):
            qkv = tensors(seed)
            usual(plan, qkv)
            log.clear()
            usual(plan, qkv)
            launches = len(log)
            log.clear()
            execute_with_lse(plan, *qkv, scale=None, key_valid=None, backend="hopper", want_lse=False)
            assert len(log) == launches + fills
    assert counted.runs == 3 * 2 + 1


@needs_idle
def test_what_torch_fills_is_filled_again(log: Log) -> None:
    made = {
        "ones": lambda: torch.ones(3, 5),
        "zeros": lambda: torch.zeros(1025, dtype=torch.int32),
        "full": lambda: torch.full((7,), 2.5),
        "like": lambda: torch.zeros_like(torch.empty(4, 4)),
        "bool": lambda: torch.ones(9, dtype=torch.bool),
        "new": lambda: torch.empty(1).new_full((2, 3), 4),
    }
    for name, make in made.items():
        with Recording([]) as recording:
            x = make()
        assert recording.failure is None, name
        assert recording.address(x) is not None, name
        assert len(recording.launches) == 1, name
    with Recording([]) as recording:
        torch.zeros(3).add_(1)
    assert recording.failure is not None


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["adaspa", "auto", "union"])
@pytest.mark.parametrize("backend", ["hopper", "triton"])
def test_bits_with_masks_on_a_gpu(counted: Counted, name: str, backend: str) -> None:
    plan = on_gpu(plan_of(name) if name == "adaspa" else plan_of(name, order="gilbert"))
    for batch in (1, 2):
        for seed in range(5):
            qkv = tuple(x.cuda() for x in tensors(seed, batch=batch))
            valid = mask_of(seed, batch, "cuda")
            want, want_lse = usual_masked(plan, qkv, valid, backend)
            runs = counted.runs
            got, got_lse = masked(plan, qkv, valid, backend)
            assert torch.equal(got, want), (batch, seed)
            assert torch.equal(got_lse, want_lse)
            assert seed < 3 or counted.runs == runs


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["int8", "int8_fp8", "fp8", "int8_int8", "int4"])
@pytest.mark.parametrize("name", ["adaspa", "auto", "union"])
def test_bits_in_8_bit_on_a_gpu(counted: Counted, name: str, precision: str) -> None:
    plan = on_gpu(plan_of(name, precision=precision, block_q=128, block_k=128))
    replays = 0
    for seed in range(6):
        qkv = tuple(x.cuda() for x in tensors(seed))
        want = usual(plan, qkv)[0]
        runs = counted.runs
        got = execute_with_lse(plan, *qkv, scale=None, key_valid=None, backend="hopper", want_lse=False)[0]
        assert torch.equal(got, want), seed
        replays += counted.runs == runs
    assert replays >= 3 or precision == "int4"
