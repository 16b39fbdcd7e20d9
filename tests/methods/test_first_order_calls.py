"""Calls with first-order terms: launches alone, heads in turns, graphs of a compiler, batches."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch

from tests.kernels.launches import Log
from tests.methods import test_replayed
from tests.methods.test_replayed import Counted, compare, needs_idle, plan_of, tensors

pytestmark = pytest.mark.no_poison
log, counted = test_replayed.log, test_replayed.counted  # fixtures


@pytest.fixture
def hopper(log: Log) -> Iterator[Log]:
    """Launches as on a Hopper GPU, the product of matrices too."""
    with mock.patch("dit_accel_kernels.first_order.launch.capability", return_value=90):
        yield log


@needs_idle
@pytest.mark.parametrize("portable", [False, True])
def test_they_are_launches_alone(hopper: Log, counted: Counted, portable: bool) -> None:
    blocks = {"block_q": 64} if portable else {}
    plan = plan_of("auto", compensate="first_order:64", pictures=(), **blocks)
    for seed in range(3):
        compare(plan, tensors(seed), hopper, backend="triton" if portable else "hopper")
    assert counted.runs == 3 * 2 + 1


@needs_idle
def test_a_kept_residual_is_added_by_the_same_launches(hopper: Log, counted: Counted) -> None:
    plan = plan_of("auto", compensate="residual:first_order,64", pictures=())
    state, plan.state = plan.state, None
    without = compare(plan, tensors(), hopper)
    plan.state, plan.replays = state.to(torch.bfloat16), None
    runs = counted.runs
    for seed in range(2):
        assert compare(plan, tensors(seed), hopper) == without
    assert counted.runs == runs + 2 * 2 + 1
