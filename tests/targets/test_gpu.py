"""Targets and the cost model on a GPU: nothing is read on the host while plans are made, and times are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from problem import make_problem

from dit_accel.adapter import StepInfo
from dit_accel.cost import CostModel, CostStore
from dit_accel.cost.model import PayCall
from dit_accel.method import Method
from dit_accel.planner import Planner
from dit_accel.policy import Policy
from dit_accel.targets.control import ErrorControl

pytestmark = pytest.mark.gpu

METHOD = Method(
    name="trial", density=0.2, order="axes", order_choice="recall", score="mass", select="top_k", compensate="mean"
)


def test_densities_are_found_without_waiting_for_the_device() -> None:
    cpu = make_problem()
    problem = cpu._replace(**{n: getattr(cpu, n).cuda() for n in ("query", "key", "value", "out", "lse")})
    planner = Planner(METHOD)

    def plan() -> torch.Tensor:
        ctx = problem.context(planner)
        ctx.control = ErrorControl(0.1)
        return planner.plan(ctx).density

    plan()  # tables, self-tests and compilation
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = plan()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert found.unique().numel() > 1
    assert float(found.mean()) < 0.6


def test_a_shape_is_timed_on_the_device_and_kept(tmp_path: Path) -> None:
    cpu = make_problem(text=0)
    q, k, v = (x.cuda().half() for x in (cpu.query, cpu.key, cpu.value))
    call = PayCall(q, k, v, None, None, cpu.geometry, StepInfo(step=0, steps=30), "triton")
    reasons = [CostModel(CostStore(tmp_path)).why_not(Planner(METHOD), Policy(METHOD), call) for _ in range(2)]
    assert reasons[0] == reasons[1]
    assert len(list(tmp_path.iterdir())) == 1
