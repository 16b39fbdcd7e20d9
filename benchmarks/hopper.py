"""The Hopper kernel and its variants beside the Triton kernel and dense cuDNN attention.

``PYTHONPATH=kernels python benchmarks/hopper.py`` takes under two minutes on one H100 or H200. Each variant must first
agree with the masked reference in a process of its own (a wrong barrier hangs); these processes run at once, which also
fills Triton's cache. Rates are 4 * visited blocks * 128 * 128 * D / time; those of dense attention count all blocks.
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
WARM_LIMIT_S = 100.0


@dataclass(frozen=True)
class Row:
    shape: str
    density: float
    what: str
    ms: float
    tflops: float


def variants(dim: int) -> dict[str, HopperConfig]:
    """The configurations to compare, the default first."""
    base = hopper_config(dim, 128)
    deep = 3 if dim == 128 else 6
    return {
        "default": base,
        "one job a program": replace(base, persistent=False),
        "one job, q_stages 1": replace(base, persistent=False, q_stages=1),
        f"stages {deep}, q_stages 1": replace(base, stages=deep, q_stages=1),
        f"stages {deep}, one job": replace(base, stages=deep, q_stages=1, persistent=False),
        "turns": replace(base, pingpong=True),
        f"turns, stages {deep}": replace(base, pingpong=True, stages=deep, q_stages=1),
        "producer 40": replace(base, consumer_regs=232, producer_regs=40),
    }


def make(
    heads: int, tokens: int, dim: int, density: float, uneven: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v ``[1, H, S, D]`` as views of ``[1, S, H, D]`` and levels ``[1, H, Qb, Kb]``, equal or uneven rows."""
    gen = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(1, tokens, heads, dim, generator=gen, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for _ in range(3)
    )
    blocks = -(-tokens // 128)
    keep = torch.full((1, heads, blocks, 1), max(1.0, round(density * blocks)), device="cuda")
    if uneven:  # exponential lengths: their standard deviation is about their mean
        share = torch.empty(1, heads, blocks, 1, device="cuda").exponential_(generator=gen)
        keep = (keep * share).round().clamp(1, blocks)
    rank = torch.rand(1, heads, blocks, blocks, generator=gen, device="cuda").argsort(-1).argsort(-1)
    return q, k, v, (rank < keep).to(torch.uint8)


def to_lists(levels: Tensor) -> BlockLists:
    return replace(lists_from_levels(levels, 128, 128), partial=None)


def remainder(k: Tensor, v: Tensor, levels: Tensor) -> Pooled:
    blocks = levels.shape[-1]
    means = [x.float().reshape(1, x.shape[1], blocks, 128, x.shape[3]).mean(3).to(x.dtype) for x in (k, v)]
    bias = torch.full((1, 1, blocks), 128.0, device=k.device).log()
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


def timed(call: Callable[[], Any], budget_s: float = 0.15) -> float:
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


def bench(shape: str, failed: dict[tuple[int, str], str], rows: list[Row]) -> None:
    """All rows of one shape."""
    from dit_accel_kernels.block_sparse.hopper_launch import block_sparse_hopper
    from dit_accel_kernels.block_sparse.launch import block_sparse_triton

    heads, tokens, dim = SHAPES[shape]
    scale = dim**-0.5

    def add(density: float, what: str, blocks: int, call: Callable[[], Any]) -> None:
        try:
            ms = timed(call)
        except Exception as error:
            sys.stdout.write(f"{shape} {density} {what}: {type(error).__name__} {str(error)[:120]}\n")
            return
        rows.append(Row(shape, density, what, ms, 4e-9 * blocks * 128 * 128 * dim / ms))

    def dense(label: str) -> None:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            add(1.0, label, levels.numel(), partial(F.scaled_dot_product_attention, q, k, v))

    for density, uneven in ((1.0, False), (0.5, False), (0.25, False), (0.1, False), (0.25, True)):
        q, k, v, levels = make(heads, tokens, dim, density, uneven)
        lists, blocks, mark = to_lists(levels), int(levels.sum()), " (uneven)" * uneven
        if density == 1.0:
            dense("cuDNN dense")
        add(density, "triton" + mark, blocks, partial(block_sparse_triton, q, k, v, lists, scale=scale))
        call = partial(block_sparse_hopper, q, k, v, lists, scale=scale)
        for name, config in variants(dim).items():
            every = uneven or (density in (1.0, 0.25) and shape != "H24 S16896 d128")
            if (dim, name) not in failed and (every or name == "default"):
                add(density, f"hopper {name}{mark}", blocks, partial(call, config=config))
    q, k, v, levels = make(heads, tokens, dim, 0.2)
    lists, blocks, pooled = to_lists(levels), int(levels.sum()), remainder(k, v, levels)
    order = TokenOrder(torch.randperm(tokens, device="cuda").int()[None], torch.zeros(heads).int().cuda())
    if (dim, "default") not in failed:
        calls = {
            name: partial(run, q, k, v, lists, scale=scale)
            for name, run in (("triton", block_sparse_triton), ("hopper", block_sparse_hopper))
        }
        for name, call in calls.items():
            add(0.2, name, blocks, call)
            add(0.2, f"{name} + remainder", blocks, partial(call, pooled=pooled))
            add(0.2, f"{name} + order", blocks, partial(call, order=order))
    dense("cuDNN dense again")


def main(argv: list[str] | None = None) -> int:
    """Gate, measure, print a table and write JSON to ``$OUT``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--warm", nargs=2, metavar=("DIM", "VARIANT"), help="only check one variant")
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    args = parser.parse_args(argv)
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        sys.stdout.write("needs a GPU of compute capability 9.0\n")
        return 2
    if args.warm:
        return warm(int(args.warm[0]), args.warm[1])
    began = time.monotonic()
    failed = gate()
    sys.stdout.write(f"gate took {time.monotonic() - began:.0f} s\n")
    for key, said in failed.items():
        sys.stdout.write(f"FAILED {key}:\n{said}\n")
    rows: list[Row] = []
    for shape in args.shapes:
        bench(shape, failed, rows)
    dense = {row.shape: row.tflops for row in rows if row.what == "cuDNN dense"}
    sys.stdout.write(f"{'shape':<16} density {'kernel':<34} {'ms':>8} TFLOP/s  of cuDNN\n")
    for row in rows:
        ratio = row.tflops / dense.get(row.shape, float("nan"))
        sys.stdout.write(
            f"{row.shape:<16} {row.density:>7} {row.what:<34} {row.ms:>8.3f} {row.tflops:>7.0f} {ratio:>9.2f}\n"
        )
    out = os.environ.get("OUT")
    if out:
        text = json.dumps({"gpu": torch.cuda.get_device_name(), "rows": [asdict(row) for row in rows]}, indent=1)
        Path(out, "hopper.json").write_text(text, encoding="utf-8")
    sys.stdout.write(f"{time.monotonic() - began:.0f} s in all\n")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
