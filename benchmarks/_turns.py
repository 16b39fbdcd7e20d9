"""Kernels of one case in turns, so that the clock of a warming GPU is the same for all: rows, tables, dense attention."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

CUDNN = "cuDNN dense"


@dataclass(frozen=True)
class Row:
    """One kernel on one case: median milliseconds of the rounds, rate, and the lowest and the highest rate."""

    shape: str
    case: str
    what: str
    ms: float
    tflops: float
    lowest: float
    highest: float


def timed(call: Callable[[], Any], budget_s: float = 0.06) -> float:
    """Median milliseconds of one call."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    torch.cuda.synchronize()
    count = max(3, min(30, int(budget_s / max(time.perf_counter() - began, 1e-6))))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for start, stop in events:
        start.record()
        call()
        stop.record()
    torch.cuda.synchronize()
    return float(statistics.median(start.elapsed_time(stop) for start, stop in events))


def in_turns(shape: str, case: str, calls: dict[str, tuple[Callable[[], Any], float]], rounds: int) -> list[Row]:
    """Rows of a case: each call with its number of floating-point operations, in turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(rounds):
        # Whatever follows a heavier kernel finds a lower clock: each round has another order.
        at = turn % len(names)
        for name in (names[at:] + names[:at])[:: 1 if turn % 2 == 0 else -1]:
            call = calls[name][0]
            try:
                times[name].append(timed(call))
            except Exception as error:
                sys.stdout.write(f"{shape} {case} {name}: {type(error).__name__} {str(error)[:120]}\n")
    rows = []
    for name, ms in times.items():
        if ms:
            rates = [1e-9 * calls[name][1] / x for x in ms]
            rows.append(Row(shape, case, name, statistics.median(ms), statistics.median(rates), min(rates), max(rates)))
    return rows


def report(rows: list[Row]) -> None:
    dense_rates = {(row.shape, row.case): row.tflops for row in rows if row.what == CUDNN}
    sys.stdout.write(f"{'shape':<16} {'case':<12} {'kernel':<24} {'ms':>8} TFLOP/s  lowest highest  of cuDNN\n")
    for row in rows:
        ratio = row.tflops / dense_rates.get((row.shape, row.case), float("nan"))
        sys.stdout.write(
            f"{row.shape:<16} {row.case:<12} {row.what:<24} {row.ms:>8.3f} {row.tflops:>7.0f} {row.lowest:>7.0f} "
            f"{row.highest:>7.0f} {ratio:>9.3f}\n"
        )


def dense(q: Tensor, k: Tensor, v: Tensor) -> None:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        F.scaled_dot_product_attention(q, k, v)


def graphed(call: Callable[[], Any], times: int = 8) -> Callable[[], Any]:
    """The call, some times in a CUDA graph: what short calls take on the GPU alone."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            call()
    return graph.replay


def trust(dim: int) -> None:
    """Mark backends as tested: the gate has compared them with the reference, and a self-test compiles ten kernels."""
    from dit_accel_kernels import backends

    for name in ("hopper", "triton"):
        for block_q, block_k in ((128, 128), (128, 64), (64, 64)):
            where = backends._where(torch.device("cuda"))
            backends._self_tests[name, where, torch.bfloat16, dim, block_q, block_k] = None
