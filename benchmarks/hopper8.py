"""The 8-bit Hopper kernel beside the 16-bit one, the 8-bit Triton kernel and dense cuDNN attention.

``PYTHONPATH=kernels python benchmarks/hopper8.py`` on one H100 or H200. As in ``hopper.py``, each variant must first agree
with the reference in a process of its own, and all kernels of a case take turns. Rates are 4 * visited pairs * D / time;
"+ quantise" counts the time of the quantiser. ``--cycles`` runs each kernel twice and prints nothing, for
``ncu --metrics sm__cycles_elapsed.max``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hopper import CUDNN, SHAPES, Row, dense, in_turns, make, report, to_lists
from torch import Tensor

from dit_accel_kernels.quantize import PRECISIONS, QuantizedQKV, quantize_qkv
from dit_accel_kernels.quantized.hopper8_specs import Hopper8Config, hopper8_config
from dit_accel_kernels.types import BlockLists

KINDS = ("int8", "int8_fp8", "fp8")
WARM_LIMIT_S = 60.0


def variants(precision: str, dim: int) -> dict[str, Hopper8Config]:
    """The configurations to compare, the default first."""
    base = hopper8_config(dim, PRECISIONS[precision].pv)
    if PRECISIONS[precision].pv == "bf16":
        return {"default": base, "one stage less": replace(base, stages=base.stages - 1)}
    return {
        "default": base,
        "no turns": replace(base, turns=False),
        "no lines": replace(base, lines=False),
    }


def run(q: Tensor, made: QuantizedQKV, lists: BlockLists, **kwargs: Any) -> tuple[Tensor, Tensor]:
    from dit_accel_kernels.quantized.hopper8_launch import quantized_hopper

    return quantized_hopper(q, made, lists, scale=q.shape[-1] ** -0.5, **kwargs)


def warm(precision: str, dim: int) -> int:
    """Compile all variants of a precision and compare them with the reference."""
    from dit_accel_kernels.quantized.reference import quantized_reference

    q, k, v, levels = make(6, 6144, dim, 0.2, uneven=True)
    made, lists = quantize_qkv(q, k, v, precision, block_k=128), to_lists(levels)
    want, _ = quantized_reference(q.float(), made, lists, scale=dim**-0.5)
    worst = 0.0
    for config in variants(precision, dim).values():
        for return_lse in (True, False):
            out, _ = run(q, made, lists, config=config, return_lse=return_lse)
            torch.cuda.synchronize()
            worst = max(worst, ((out.float() - want).norm() / want.norm()).item())
    sys.stdout.write(f"relative error {worst:.2e}\n")
    return 0 if worst < (6e-3 if PRECISIONS[precision].pv == "bf16" else 4e-2) else 1


def gate(dims: list[int]) -> set[tuple[str, int]]:
    """Warm all variants at once; returns those that failed."""
    running = {}
    for dim in dims:
        for precision in KINDS:
            command = [sys.executable, str(Path(__file__).resolve()), "--warm", precision, str(dim)]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            running[precision, dim] = process
    failed, end = set(), time.monotonic() + WARM_LIMIT_S
    for key, process in running.items():
        try:
            said, _ = process.communicate(timeout=max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            said = "still running (hang?): " + process.communicate()[0]
        lines = [line for line in said.strip().splitlines() if line]
        sys.stdout.write(f"gate {key!s:<20} {'; '.join(lines[-2:])[:300]}\n")
        if process.returncode:
            failed.add(key)
    return failed


def cases(shape: str, densities: list[float], failed: set[tuple[str, int]], rounds: int, every: float) -> list[Row]:
    """All densities of one shape, with all variants and the Triton kernel at density ``every``."""
    from dit_accel_kernels.block_sparse.hopper_launch import block_sparse_hopper
    from dit_accel_kernels.quantized.launch import quantized_triton

    heads, tokens, dim = SHAPES[shape]
    scale, rows = dim**-0.5, []
    for density in densities:
        q, k, v, levels = make(heads, tokens, dim, density)
        lists = to_lists(levels)
        work = 4.0 * 128 * 128 * dim * int(levels.sum())
        calls: dict[str, tuple[Callable[[], Any], float]] = {
            CUDNN: (partial(dense, q, k, v), 4.0 * heads * tokens * tokens * dim),
            "hopper 16 bit": (partial(block_sparse_hopper, q, k, v, lists, scale=scale, return_lse=False), work),
        }
        for precision in KINDS:
            made = quantize_qkv(q, k, v, precision, block_k=128)
            if density == every:
                call = partial(quantized_triton, q, made, lists, scale=scale, return_lse=False)
                calls[f"{precision} triton"] = (call, work)
            if (precision, dim) in failed:
                continue
            for name, config in variants(precision, dim).items():
                if name == "default" or density == every:
                    call = partial(run, q, made, lists, config=config, return_lse=False)
                    calls[f"{precision} hopper {name}"] = (call, work)
            if density == every:
                calls[f"{precision} hopper + lse"] = (partial(run, q, replace(made, k_mean=None), lists), work)
            calls[f"{precision} hopper + quantise"] = (partial(with_quantising, q, k, v, lists, precision), work)
        rows += in_turns(shape, f"{density}", calls, rounds)
    return rows


def with_quantising(q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, precision: str) -> None:
    run(q, quantize_qkv(q, k, v, precision, block_k=lists.block_k), lists, return_lse=False)


def accumulators() -> dict[str, float]:
    """Mean output for values of 1 over 32768 keys: what sums of e4m3 products lose."""
    found = {}
    for label, width in (("flat", 1e-3), ("random", 1.0)):
        q, k, v, levels = make(2, 32768, 128, 1.0)
        for precision in KINDS:
            made = quantize_qkv(q, k * width, torch.ones_like(v), precision, block_k=128)
            found[f"{label} {precision}"] = run(q, made, to_lists(levels))[0].float().mean().item()
    return found


def cycles(shape: str, density: float, precisions: list[str]) -> None:
    """Two calls of each variant."""
    heads, tokens, dim = SHAPES[shape]
    q, k, v, levels = make(heads, tokens, dim, density)
    lists = to_lists(levels)
    for precision in precisions:
        made = quantize_qkv(q, k, v, precision, block_k=128)
        for config in variants(precision, dim).values():
            for _ in range(2):
                run(q, made, lists, config=config, return_lse=False)
    torch.cuda.synchronize()


def main(argv: list[str] | None = None) -> int:
    """Gate, measure, print a table and write JSON to ``$OUT``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--warm", nargs=2, metavar=("PRECISION", "DIM"), help="only check one precision")
    parser.add_argument("--cycles", action="store_true", help="only launch, for a profiler")
    parser.add_argument("--shapes", nargs="*", default=["H12 S32768 d128", "H30 S17792 d64"], choices=list(SHAPES))
    parser.add_argument("--densities", nargs="*", type=float, default=[1.0, 0.25, 0.1])
    parser.add_argument("--every", type=float, default=0.25, help="density at which all variants are timed")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        sys.stdout.write("needs a GPU of compute capability 9.0\n")
        return 2
    if args.warm:
        return warm(args.warm[0], int(args.warm[1]))
    if args.cycles:
        for shape in args.shapes:
            for density in args.densities:
                cycles(shape, density, list(KINDS))
        return 0
    began = time.monotonic()
    failed = gate(sorted({SHAPES[shape][2] for shape in args.shapes}))
    sys.stdout.write(f"gate took {time.monotonic() - began:.0f} s\n")
    rows: list[Row] = []
    for shape in args.shapes:
        rows += cases(shape, args.densities, failed, args.rounds, args.every)
    report(rows)
    lost = accumulators()
    sys.stdout.write(f"values of 1: {lost}\n")
    out = os.environ.get("OUT")
    if out:
        about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "values_of_1": lost}
        text = json.dumps(about | {"rows": [asdict(row) for row in rows]}, indent=1)
        Path(out, "hopper8.json").write_text(text, encoding="utf-8")
    sys.stdout.write(f"{time.monotonic() - began:.0f} s in all\n")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
