"""Timing one attention layer, dense and sparse, on the tensors of a call."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from dit_accel.context import PlanContext
from dit_accel.cost.store import Cost
from dit_accel.plan import Plan, execute
from dit_accel.planner import Planner

__all__ = ["DENSITIES", "Timer", "measure", "wall_time"]

#: Milliseconds of a function on a device.
Timer = Callable[[str, Callable[[], object], torch.device], float]

#: Densities whose time is measured; others lie on the line through them.
DENSITIES = (0.1, 0.5)
_REPEATS, _ENOUGH_MS = 5, 200.0


def wall_time(name: str, work: Callable[[], object], device: torch.device) -> float:
    """Median time of a few calls after a first one, milliseconds; fewer calls where one takes long."""

    def once() -> float:
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end))
        start = time.perf_counter()
        work()
        return (time.perf_counter() - start) * 1e3

    once()  # compilation and first allocations
    times = [once()]
    while len(times) < _REPEATS and sum(times) < _ENOUGH_MS:
        times.append(once())
    return statistics.median(times)


def measure(planner: Planner, ctx: PlanContext, value: Tensor, *, backend: str, timer: Timer) -> Cost:
    """Times of one layer.

    Args:
        planner: of the method.
        ctx: a context in which nothing is chosen yet, with its log-sum-exp if the method needs it.
        value: ``[B, H, S, D]`` in natural order.
        backend: kernel backend of the sparse calls.
        timer: tells the milliseconds of a function; tests give their own.
    """
    q, k, device = ctx.query, ctx.key, ctx.query.device
    mask = None if ctx.key_valid is None else ctx.key_valid[:, None, None]

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(q, k, value, attn_mask=mask, scale=ctx.scale)

    def plan_at(density: float) -> Plan:
        return planner.plan(dataclasses.replace(ctx, density=density, control=None, memory={}, cost=0.0))

    def sparse(plan: Plan) -> Tensor:
        return execute(plan, q, k, value, scale=ctx.scale, key_valid=ctx.key_valid, backend=backend)

    dense_ms = timer("dense", dense, device)
    pairs = []
    for density in DENSITIES:
        plan = plan_at(density)
        pairs.append((density, timer(f"sparse {density:g}", partial(sparse, plan), device)))
    plan_ms = timer("plan", lambda: plan_at(DENSITIES[0]), device)
    return Cost(dense_ms, tuple(pairs), plan_ms)
