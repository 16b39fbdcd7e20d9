"""The `cpu` backend beside dense attention on a CPU: ``python benchmarks/cpu_attention.py``.

First a correctness gate: nothing is timed until the backend agrees with its reference at every shape, on a mask that dense
attention would fail. Dense is ``F.scaled_dot_product_attention``. Lines are appended to ``results.csv`` in the columns of
``kernels.py``; ``ratio_to_cudnn``, of which there is none on a CPU, is nan, and the dense time is a line of its own.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "kernels"), str(Path(__file__).parent)]

from _timing import Result, Timing, append_csv, environment  # noqa: E402

import dit_accel_kernels as dk  # noqa: E402

SHAPES = ((5, 4352, 64), (5, 8448, 64), (4, 4096, 128), (4, 8192, 128))
TOY_SHAPES = ((2, 500, 64),)
BLOCK = 64
GATE = 1e-4
CPU = torch.device("cpu")


def levels(heads: int, tokens: int, density: float) -> Tensor:
    """uint8 ``[1, H, Qb, Kb]`` with the same number of random blocks in each row."""
    blocks = -(-tokens // BLOCK)
    scores = torch.rand(1, heads, blocks, blocks)
    chosen = scores.topk(max(1, round(density * blocks)), sorted=False).indices
    return torch.zeros(scores.shape, dtype=torch.uint8).scatter_(3, chosen, 1)


def error(got: Tensor, want: Tensor) -> float:
    """Root mean square of the difference over that of the reference."""
    return float((got - want).square().mean().sqrt() / want.square().mean().sqrt())


def pooled_of(k: Tensor, v: Tensor, chosen: Tensor) -> dk.Pooled:
    """The skipped blocks as mean keys and values."""
    mean_k, _, count = dk.block_stats(k, block=BLOCK)
    mean_v = dk.block_stats(v, block=BLOCK).mean
    return dk.Pooled(mean_k, mean_v, count.log()[:, None].contiguous(), dk.pack_bits(chosen))


def measure(calls: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float]) -> dict[str, Timing]:
    """Time calls in turn, so that a change in the machine's load meets all of them alike."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            began = clock()
            call()
            samples[name].append((clock() - began) * 1e3)
    found = {}
    for name, values in samples.items():
        ordered = sorted(values)
        found[name] = Timing(*(ordered[min(rounds - 1, int(rounds * share))] for share in (0.2, 0.5, 0.8)))
    return found


def run(
    heads: int,
    tokens: int,
    dim: int,
    density: float,
    rounds: int,
    clock: Callable[[], float],
    about: dict[str, str],
) -> list[Result]:
    """Check one shape, then time dense, sparse and sparse with a remainder."""
    q, k, v = (torch.randn(1, tokens, heads, dim).transpose(1, 2) for _ in range(3))
    chosen = levels(heads, tokens, density)
    lists = dk.lists_from_levels(chosen, BLOCK, BLOCK)
    pooled = pooled_of(k, v, chosen)
    dense = F.scaled_dot_product_attention(q, k, v)
    cases: dict[str, dict[str, Any]] = {"sparse": {}, "sparse pooled": {"pooled": pooled}}
    for name, extra in cases.items():
        want = dk.block_sparse_attention(q, k, v, lists, backend="reference", **extra)
        got = dk.block_sparse_attention(q, k, v, lists, backend="cpu", **extra)
        if not error(got, want) < GATE:
            raise SystemExit(f"gate failed at {(heads, tokens, dim)}, {name}: error {error(got, want):.2e}")
        if not extra and error(dense, want) < 100 * GATE:
            raise SystemExit(f"gate proves nothing at {(heads, tokens, dim)}: the mask does not show")
    calls: dict[str, Callable[[], Any]] = {"dense": lambda: F.scaled_dot_product_attention(q, k, v)}
    for name, extra in cases.items():
        calls[name] = partial(dk.block_sparse_attention, q, k, v, lists, backend="cpu", **extra)
    times = measure(calls, rounds, clock)
    results = []
    for name, timing in times.items():
        share = 1.0 if name == "dense" else density
        rate = 4 * heads * tokens**2 * dim * share / timing.p50_ms / 1e9
        shape = f"h{heads} s{tokens} d{dim}"
        numbers = (timing.p20_ms, timing.p50_ms, timing.p80_ms, rate, float("nan"))
        backend = "sdpa" if name == "dense" else "cpu"
        results.append(Result(f"cpu {name}", backend, shape, share, *numbers, **about))
        ratio = times["dense"].p50_ms / timing.p50_ms
        print(f"{shape:18} {name:14} {share:5.2f} {timing.p50_ms:9.1f} ms   {ratio:5.2f} x dense", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--density", type=float, default=0.25)
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each line")
    parser.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")
    parser.add_argument("--cpu-time", action="store_true", help="processor time, for a busy machine; use --threads 1")
    parser.add_argument("--toy", action="store_true", help="one small shape")
    parser.add_argument("--csv", type=Path, default=Path(__file__).with_name("results.csv"))
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    clock = time.process_time if args.cpu_time else time.perf_counter
    what = f"cpu, {torch.get_num_threads()} threads, {'processor' if args.cpu_time else 'wall'} time"
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    print(f"{what}, load average {load:.1f}; float32, blocks of {BLOCK}")
    with torch.no_grad():
        for shape in TOY_SHAPES if args.toy else SHAPES:
            about = {**environment(CPU), "gpu": what}
            append_csv(args.csv, run(*shape, args.density, args.rounds, clock, about))


if __name__ == "__main__":
    main()
