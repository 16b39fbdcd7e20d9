"""The Hopper kernel beside the Triton kernel and dense cuDNN attention.

``PYTHONPATH=kernels python benchmarks/hopper.py`` takes about two minutes on one H100 or H200. Each variant must first
agree with the masked reference in a process of its own (a wrong barrier hangs); these processes run at once, which also
fills Triton's cache. Rates are 4 * visited pairs * D / time; those of dense attention count all pairs.

These kernels draw all the power that the GPU may use, so its clock falls with every joule that a kernel needs, and what
runs first runs fastest. All kernels of a case therefore take turns for some rounds, cuDNN among them, and the median
counts. ``--cycles`` runs each kernel twice and prints nothing: for ``ncu --metrics sm__cycles_elapsed.max``, which no clock
disturbs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_accel_kernels.block_sparse.hopper_specs import HopperConfig, hopper_config
from dit_accel_kernels.lists import lists_from_levels, pack_bits
from dit_accel_kernels.types import BlockLists, Pooled, TokenOrder

SHAPES = {"H12 S32768 d128": (12, 32768, 128), "H24 S16896 d128": (24, 16896, 128), "H30 S17792 d64": (30, 17792, 64)}
CASES = ((1.0, False), (0.5, False), (0.25, False), (0.1, False), (0.25, True))
WARM_LIMIT_S = 100.0
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


def variants(dim: int) -> dict[str, HopperConfig]:
    """The configurations to compare, the default first."""
    base = hopper_config(dim)
    return {
        "default": base,
        "online softmax": replace(base, fast=False),
        "one stage less": replace(base, stages=base.stages - 1),
        "in order": replace(base, sorted_rounds=0),
    }


def make(
    heads: int, tokens: int, dim: int, density: float, uneven: bool = False, block_k: int = 128
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v ``[1, H, S, D]`` as views of ``[1, S, H, D]`` and levels ``[1, H, Qb, Kb]``, equal or uneven rows."""
    gen = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(1, tokens, heads, dim, generator=gen, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for _ in range(3)
    )
    qb, kb = -(-tokens // 128), -(-tokens // block_k)
    keep = torch.full((1, heads, qb, 1), max(1.0, round(density * kb)), device="cuda")
    if uneven:  # exponential lengths: their standard deviation is about their mean
        share = torch.empty(1, heads, qb, 1, device="cuda").exponential_(generator=gen)
        keep = (keep * share).round().clamp(1, kb)
    rank = torch.rand(1, heads, qb, kb, generator=gen, device="cuda").argsort(-1).argsort(-1)
    return q, k, v, (rank < keep).to(torch.uint8)


def to_lists(levels: Tensor, block_k: int = 128) -> BlockLists:
    return replace(lists_from_levels(levels, 128, block_k), partial=None)


def remainder(k: Tensor, v: Tensor, levels: Tensor) -> Pooled:
    blocks = levels.shape[-1]
    size = k.shape[2] // blocks
    means = [x.float().reshape(1, x.shape[1], blocks, size, x.shape[3]).mean(3).to(x.dtype) for x in (k, v)]
    bias = torch.full((1, 1, blocks), float(size), device=k.device).log()
    return Pooled(*means, bias, pack_bits(levels))


def warm(dim: int, name: str) -> int:
    """Compile a variant with and without a remainder and compare it with the reference."""
    from dit_accel_kernels.block_sparse.hopper_launch import block_sparse_hopper
    from dit_accel_kernels.block_sparse.reference import block_sparse_reference

    q, k, v, levels = make(6, 6144, dim, 0.2, uneven=True)
    lists = to_lists(levels)
    options: list[Pooled | None] = [None, remainder(k, v, levels)] if name == "default" else [None]
    for pooled in options:
        call: dict[str, Any] = {"scale": dim**-0.5, "pooled": pooled}
        out, lse = block_sparse_hopper(q, k, v, lists, config=variants(dim)[name], return_lse=True, **call)
        torch.cuda.synchronize()
        if pooled is not None:
            call["pooled"] = replace(pooled, k=pooled.k.float(), v=pooled.v.float())
        want, want_lse = block_sparse_reference(q.float(), k.float(), v.float(), lists, **call)
        error = ((out.float() - want).norm() / want.norm()).item()
        off = (lse - want_lse).abs().max().item()
        sys.stdout.write(f"relative error {error:.2e}, log-sum-exp {off:.2e}\n")
        if not (error < 6e-3 and off < 2e-3):
            return 1
    return 0


def gate() -> dict[tuple[int, str], str]:
    """Warm all variants at once; returns what each that failed said."""
    running = {}
    for dim in (128, 64):
        for name in variants(dim):
            command = [sys.executable, str(Path(__file__).resolve()), "--warm", str(dim), name]
            pipe = subprocess.PIPE
            running[dim, name] = subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True)
    failed, end = {}, time.monotonic() + WARM_LIMIT_S
    for key, process in running.items():
        try:
            said, _ = process.communicate(timeout=max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            said = "still running (hang?): " + process.communicate()[0]
        lines = [line for line in said.strip().splitlines() if line]
        sys.stdout.write(f"gate d{key[0]} {key[1]:<22} {'; '.join(lines[-2:])[:150]}\n")
        if process.returncode:
            failed[key] = said[-1500:]
    return failed


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
    return statistics.median(start.elapsed_time(stop) for start, stop in events)


def in_turns(shape: str, case: str, calls: dict[str, tuple[Callable[[], Any], float]], rounds: int) -> list[Row]:
    """Rows of a case: each call with its number of floating-point operations, in turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, (call, _) in calls.items():
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


def dense(q: Tensor, k: Tensor, v: Tensor) -> None:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        F.scaled_dot_product_attention(q, k, v)


def main_cases(shape: str, failed: dict[tuple[int, str], str], rounds: int) -> list[Row]:
    """All densities of one shape, with all variants at 0.25."""
    from dit_accel_kernels.block_sparse.hopper_launch import block_sparse_hopper
    from dit_accel_kernels.block_sparse.launch import block_sparse_triton

    heads, tokens, dim = SHAPES[shape]
    scale, rows = dim**-0.5, []
    for density, uneven in CASES:
        q, k, v, levels = make(heads, tokens, dim, density, uneven)
        lists = to_lists(levels)
        work = 4.0 * 128 * 128 * dim * int(levels.sum())
        calls = {
            CUDNN: (partial(dense, q, k, v), 4.0 * heads * tokens * tokens * dim),
            "triton": (partial(block_sparse_triton, q, k, v, lists, scale=scale), work),
        }
        for name, config in variants(dim).items():
            if (dim, name) not in failed and (density == 0.25 or name == "default"):
                call = partial(block_sparse_hopper, q, k, v, lists, scale=scale, config=config)
                calls[f"hopper {name}"] = (call, work)
        rows += in_turns(shape, f"{density}{' uneven' * uneven}", calls, rounds)
    return rows


def feature_cases(shape: str, rounds: int) -> list[Row]:
    """What a remainder, an order, padding and key blocks of 64 cost at density 0.2; rates count exact blocks only."""
    from dit_accel_kernels.block_sparse.hopper_launch import block_sparse_hopper
    from dit_accel_kernels.block_sparse.launch import block_sparse_triton

    heads, tokens, dim = SHAPES[shape]
    rows = []
    for block_k in (128, 64):
        q, k, v, levels = make(heads, tokens, dim, 0.2, block_k=block_k)
        lists, pooled = to_lists(levels, block_k), remainder(k, v, levels)
        order = TokenOrder(torch.randperm(tokens, device="cuda").int()[None], torch.zeros(heads).int().cuda())
        valid = (torch.arange(tokens, device="cuda") < tokens - 200)[None]
        work = 4.0 * 128 * block_k * dim * int(levels.sum())
        calls: dict[str, tuple[Callable[[], Any], float]] = {}
        for backend, run in (("hopper", block_sparse_hopper), ("triton", block_sparse_triton)):
            call = partial(run, q, k, v, lists, scale=dim**-0.5)
            calls[backend] = (call, work)
            calls[f"{backend} + remainder"] = (partial(call, pooled=pooled), work)
            calls[f"{backend} + order"] = (partial(call, order=order), work)
            calls[f"{backend} + padding"] = (partial(call, key_valid=valid), work)
        rows += in_turns(shape, f"0.2 by {block_k}", calls, rounds)
    return rows


def cycles() -> None:
    """Two calls of each variant at each density."""
    from dit_accel_kernels.block_sparse.hopper_launch import block_sparse_hopper

    for heads, tokens, dim in SHAPES.values():
        for density, uneven in CASES:
            q, k, v, levels = make(heads, tokens, dim, density, uneven)
            for config in variants(dim).values():
                for _ in range(2):
                    block_sparse_hopper(q, k, v, to_lists(levels), scale=dim**-0.5, config=config)
    torch.cuda.synchronize()


def report(rows: list[Row]) -> None:
    dense_rates = {(row.shape, row.case): row.tflops for row in rows if row.what == CUDNN}
    sys.stdout.write(f"{'shape':<16} {'case':<12} {'kernel':<24} {'ms':>8} TFLOP/s  lowest highest  of cuDNN\n")
    for row in rows:
        ratio = row.tflops / dense_rates.get((row.shape, row.case), float("nan"))
        sys.stdout.write(
            f"{row.shape:<16} {row.case:<12} {row.what:<24} {row.ms:>8.3f} {row.tflops:>7.0f} {row.lowest:>7.0f} "
            f"{row.highest:>7.0f} {ratio:>9.3f}\n"
        )


def main(argv: list[str] | None = None) -> int:
    """Gate, measure, print a table and write JSON to ``$OUT``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--warm", nargs=2, metavar=("DIM", "VARIANT"), help="only check one variant")
    parser.add_argument("--cycles", action="store_true", help="only launch, for a profiler")
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        sys.stdout.write("needs a GPU of compute capability 9.0\n")
        return 2
    if args.warm:
        return warm(int(args.warm[0]), args.warm[1])
    if args.cycles:
        cycles()
        return 0
    began = time.monotonic()
    failed = gate()
    sys.stdout.write(f"gate took {time.monotonic() - began:.0f} s\n")
    for key, said in failed.items():
        sys.stdout.write(f"FAILED {key}:\n{said}\n")
    rows: list[Row] = []
    for shape in args.shapes:
        rows += main_cases(shape, failed, args.rounds)
        if shape == "H12 S32768 d128" and (128, "default") not in failed:
            rows += feature_cases(shape, args.rounds)
    report(rows)
    out = os.environ.get("OUT")
    if out:
        text = json.dumps({"gpu": torch.cuda.get_device_name(), "rows": [asdict(row) for row in rows]}, indent=1)
        Path(out, "hopper.json").write_text(text, encoding="utf-8")
    sys.stdout.write(f"{time.monotonic() - began:.0f} s in all\n")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
