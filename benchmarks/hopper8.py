"""The 8-bit Hopper kernel beside the 16-bit one, the 8-bit Triton kernel, dense cuDNN attention and 8-bit peers.

    PYTHONPATH=.:kernels:eval python benchmarks/hopper8.py --out hopper8      # one H100 or H200

As in ``hopper.py``, each variant must first agree with the reference in a process of its own, and all kernels of a case
take turns. Rates are 4 * visited pairs * D / time. "+ quantise" counts the time of the quantiser. "whole" is a call whose
keys and values come in natural order: the 16-bit one moves them first, the 8-bit one while it quantises; both take queries
and give outputs in natural order. The quantiser alone, the permutation of keys and values, and calls of a few milliseconds
are timed as CUDA graphs of four calls, so without their host. Dense cases have the peers that are installed, quantising
included as they do it. Rows are written as they come, with device, versions and commit. ``--cycles`` runs each kernel twice
and prints nothing, for ``ncu --metrics sm__cycles_elapsed.max``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from _eight_bit_calls import Calls, Problem, case_calls, peers, quantiser_calls, run, variants
from _hopper_inputs import SHAPES, make, to_lists
from _timing import environment
from _turns import Row, graphed, in_turns, report

from dit_accel_eval.files import write_json
from dit_accel_kernels.quantize import PRECISIONS, quantize_qkv
from dit_accel_kernels.types import TokenOrder

KINDS = ("int8", "int8_fp8", "fp8")
WARM_LIMIT_S = 60.0
SHORT = 2e12  # floating-point operations of 3 ms


def warm(precision: str, dim: int, every: bool) -> int:
    """Compile a precision, with ``every`` all its variants and the log-sum-exp, and compare with the reference."""
    from dit_accel_kernels.quantized.reference import quantized_reference

    q, k, v, levels = make(6, 6144, dim, 0.2, uneven=True)
    lists = to_lists(levels)
    order = TokenOrder(torch.randperm(6144, device="cuda").int()[None], torch.zeros(6).int().cuda())
    default, *others = variants(precision, dim).values()
    asked: list[dict[str, Any]] = [{"config": default, "return_lse": False}]
    asked += [{"config": default, "return_lse": False, "order": order}]
    asked += [{"config": config, "return_lse": lse} for config in (default, *others) for lse in (True, False)] * every
    worst = 0.0
    for options in asked:
        moved = options.get("order")
        made = quantize_qkv(q, k, v, precision, block_k=128, order=moved, keys_ordered=moved is None)
        want, _ = quantized_reference(q.float(), made, lists, scale=dim**-0.5, order=moved)
        out, _ = run(q, made, lists, **options)
        torch.cuda.synchronize()
        worst = max(worst, ((out.float() - want).norm() / want.norm()).item())
    sys.stdout.write(f"relative error {worst:.2e}\n")
    return 0 if worst < (6e-3 if PRECISIONS[precision].pv == "bf16" else 4e-2) else 1


def gate(dims: list[int], precisions: list[str], every: bool) -> set[tuple[str, int]]:
    """Warm all precisions at once; returns those that failed."""
    running = {}
    for dim in dims:
        for precision in precisions:
            command = [sys.executable, str(Path(__file__).resolve()), "--warm", precision, str(dim)]
            command += ["--variants"] * every
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


class Record:
    """Rows, printed and written as they come."""

    def __init__(self, out: Path | None) -> None:
        about = environment(torch.device("cuda"))
        about["commit"] = os.environ.get("DIT_ACCEL_COMMIT", about["commit"])
        self.out = out
        self.made: dict[str, Any] = {"environment": about, "rows": [], "quantiser": []}

    def add(self, kind: str, rows: list[Row]) -> None:
        report(rows)
        sys.stdout.flush()
        self.made[kind] += [asdict(row) for row in rows]
        self.write()

    def write(self) -> None:
        if self.out is not None:
            write_json(self.out.with_suffix(".json"), self.made)


def shape_cases(shape: str, args: argparse.Namespace, failed: set[tuple[str, int]], record: Record) -> None:
    """All densities of one shape, uneven rows at the density of all variants, and the quantiser.

    At 75,648 tokens, where a call takes up to 0.2 s, only densities up to 0.25.
    """
    long = SHAPES[shape][1] > 50000
    densities = [d for d in args.densities if d <= 0.25 or not long]
    for density, uneven in [(d, False) for d in densities] + [(args.every, True)] * (args.uneven and not long):
        p = Problem.of(shape, density, uneven)
        calls = case_calls(p, args.precisions, failed, args.variants and density == args.every, not args.no_cudnn)
        if density == 1.0:
            more, said = peers(p)
            calls |= more
            record.made.setdefault("peers", {})[shape] = said
            sys.stdout.write(f"{shape}: {said}\n")
        record.add("rows", timed_rows(shape, f"{density}{' uneven' * uneven}", calls, args.rounds))
    calls = quantiser_calls(p, args.precisions)
    record.add("quantiser", [replace(row, ms=row.ms / 4) for row in in_turns(shape, "quantiser", calls, args.rounds)])
    torch.cuda.empty_cache()


def timed_rows(shape: str, case: str, calls: Calls, rounds: int) -> list[Row]:
    """Rows of a case; calls of a few milliseconds at most four at a time in a CUDA graph, so without their host."""
    short = {name for name, (_, work) in calls.items() if work < SHORT}
    graphs = {
        name: (graphed(call, 4), 4 * work) if name in short else (call, work) for name, (call, work) in calls.items()
    }
    rows = in_turns(shape, case, graphs, rounds)
    return [replace(row, ms=row.ms / 4) if row.what in short else row for row in rows]


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
    """Gate, measure, print tables and write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--warm", nargs=2, metavar=("PRECISION", "DIM"), help="only check one precision")
    parser.add_argument("--cycles", action="store_true", help="only launch, for a profiler")
    parser.add_argument("--shapes", nargs="*", default=["H12 S32768 d128", "H30 S17792 d64"], choices=list(SHAPES))
    parser.add_argument("--densities", nargs="*", type=float, default=[1.0, 0.25, 0.1])
    parser.add_argument("--precisions", nargs="*", default=["int8_fp8", "fp8"], choices=KINDS)
    parser.add_argument("--every", type=float, default=0.25, help="density of uneven rows and of all variants")
    parser.add_argument(
        "--variants", action="store_true", help="time all variants and the Triton kernel at that density"
    )
    parser.add_argument("--uneven", action="store_true", help="also rows of exponential length")
    parser.add_argument(
        "--no-cudnn", action="store_true", help="leave dense attention out, which is long at 75,648 tokens"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write NAME.json")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        sys.stdout.write("needs a GPU of compute capability 9.0\n")
        return 2
    if args.warm:
        return warm(args.warm[0], int(args.warm[1]), args.variants)
    if args.cycles:
        for shape in args.shapes:
            for density in args.densities:
                cycles(shape, density, list(KINDS))
        return 0
    began = time.monotonic()
    failed = gate(sorted({SHAPES[shape][2] for shape in args.shapes}), args.precisions, args.variants)
    sys.stdout.write(f"gate took {time.monotonic() - began:.0f} s\n")
    record = Record(args.out)
    for shape in args.shapes:
        shape_cases(shape, args, failed, record)
    record.made["values_of_1"] = accumulators()
    record.write()
    sys.stdout.write(f"values of 1: {record.made['values_of_1']}\n")
    sys.stdout.write(f"{time.monotonic() - began:.0f} s in all\n")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
