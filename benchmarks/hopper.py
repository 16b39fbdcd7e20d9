"""The Hopper kernel beside the Triton kernel and dense cuDNN attention.

``PYTHONPATH=.:kernels python benchmarks/hopper.py`` takes about two minutes on one H100 or H200. Each variant must first
agree with the masked reference in a process of its own (a wrong barrier hangs); these processes run at once, which also
fills Triton's cache. Rates are 4 * visited pairs * D / time; those of dense attention count all pairs.

These kernels draw all the power that the GPU may use, so its clock falls with every joule that a kernel needs, and what
runs first runs fastest. All kernels of a case therefore take turns for some rounds, cuDNN among them, and the median
counts. ``--cycles`` runs each kernel twice and prints nothing: for ``ncu --metrics sm__cycles_elapsed.max``, which no clock
disturbs.

The order of jobs is kept with the lists (``block_sparse/hopper_kept.py``), so what is timed is what all calls with given
lists but the first take, as all steps of a run but the first of a plan. Lines with "first call" sort each time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _hopper_inputs import CASES, FLUX_SHORT, LONG_CASES, SHAPES, make, remainder, to_lists
from _hopper_windows import WINDOW_PLANS, warm_windows, window_cases
from _timing import environment
from _turns import CUDNN, Row, dense, graphed, in_turns, report, trust

from dit_accel_kernels.block_sparse.hopper_specs import HopperConfig, hopper_config
from dit_accel_kernels.types import TokenOrder

WARM_LIMIT_S = 60.0


def variants(dim: int) -> dict[str, HopperConfig]:
    """The configurations to compare, the default first."""
    base = hopper_config(dim)
    return {
        "default": base,
        "bias first": replace(base, late_bias=False),
        "consumers gather": replace(base, fetch=False),
    }


def warm(dim: int, block_k: int, flags: str, name: str) -> int:
    """Compile a variant and compare it with the reference: ``p`` remainder, ``o`` order, ``v`` padding, ``n`` no LSE."""
    from dit_accel_kernels.block_sparse.hopper_launch import block_sparse_hopper
    from dit_accel_kernels.block_sparse.reference import block_sparse_reference

    q, k, v, levels = make(6, 6144, dim, 0.2, uneven=True, block_k=block_k)
    lists = to_lists(levels, block_k)
    call: dict[str, Any] = {"scale": dim**-0.5}
    if "p" in flags:
        call["pooled"] = remainder(k, v, levels)
    if "o" in flags:
        call["order"] = TokenOrder(torch.randperm(6144, device="cuda").int()[None], torch.zeros(6).int().cuda())
    if "v" in flags:
        call["key_valid"] = (torch.arange(6144, device="cuda") < 6000)[None]
    out, lse = block_sparse_hopper(q, k, v, lists, config=variants(dim)[name], return_lse="n" not in flags, **call)
    torch.cuda.synchronize()
    if "p" in flags:
        call["pooled"] = replace(call["pooled"], k=call["pooled"].k.float(), v=call["pooled"].v.float())
    want, want_lse = block_sparse_reference(q.float(), k.float(), v.float(), lists, **call)
    error = ((out.float() - want).norm() / want.norm()).item()
    seen = want_lse.isfinite()
    off = 0.0 if "n" in flags else (lse - want_lse)[seen].abs().max().item()
    sys.stdout.write(f"relative error {error:.2e}, log-sum-exp {off:.2e}\n")
    return int(not (error < 6e-3 and off < 2e-3))


def gate() -> dict[str, str]:
    """Warm all variants at once; returns what each that failed said."""
    tasks = [f"{dim} 128  default" for dim in (128, 64)] + ["128 128 n default"]
    tasks += [f"128 {block_k} {flags} default" for block_k in (128, 64) for flags in ("p", "o", "po", "v", "")]
    tasks += ["128 64 p bias_first", "128 64 v bias_first", "128 64 po consumers_gather", "128 128 o consumers_gather"]
    tasks = list(dict.fromkeys(tasks)) + [f"windows {name}" for name in WINDOW_PLANS]
    running = {}
    for task in tasks:
        words = ["--warm-windows", task.removeprefix("windows ")] if task.startswith("windows ") else None
        words = words or ["--warm", *task.replace("  ", " - ").split()]
        command = [sys.executable, str(Path(__file__).resolve()), *words]
        running[task] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    failed, end = {}, time.monotonic() + WARM_LIMIT_S
    for task, process in running.items():
        try:
            said, _ = process.communicate(timeout=max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            said = "still running (hang?): " + process.communicate()[0]
        lines = [line for line in said.strip().splitlines() if line]
        sys.stdout.write(f"gate {task:<28} {'; '.join(lines[-2:])[:150]}\n")
        if process.returncode:
            failed[task] = said[-1500:]
    return failed


def main_cases(shape: str, rounds: int) -> list[Row]:
    """All densities of one shape, and uneven rows; flash-attn-4 where ``flash4_object.py`` has compiled it."""
    from flash4_object import object_call, why_no_object

    from dit_accel_kernels.block_sparse.flash4 import flash4_lists
    from dit_accel_kernels.block_sparse.hopper_launch import block_sparse_hopper

    heads, tokens, dim = SHAPES[shape]
    scale, rows = dim**-0.5, []
    for density, uneven in CASES if tokens < 50000 else LONG_CASES:
        q, k, v, levels = make(heads, tokens, dim, density, uneven)
        lists = to_lists(levels)
        work = 4.0 * 128 * 128 * dim * int(levels.sum())
        calls: dict[str, tuple[Callable[[], Any], float]] = {
            CUDNN: (partial(dense, q, k, v), 4.0 * heads * tokens * tokens * dim),
            "hopper": (partial(block_sparse_hopper, q, k, v, lists, scale=scale), work),
        }
        if why_no_object(dim, q.dtype, tokens) is None:
            calls["flash-attn-4"] = (object_call(q, k, v, *flash4_lists(lists, tokens // 128)), work)
        if uneven:  # equal rows in the same rounds
            levels = make(heads, tokens, dim, density)[3]
            equal = 4.0 * 128 * 128 * dim * int(levels.sum())
            calls["hopper, equal rows"] = (partial(block_sparse_hopper, q, k, v, to_lists(levels), scale=scale), equal)
        rows += in_turns(shape, f"{density}{' uneven' * uneven}", calls, rounds)
    return rows


def feature_cases(shape: str, rounds: int) -> list[Row]:
    """What a remainder, an order, padding and key blocks of 64 cost at density 0.2; rates count exact blocks only."""
    from dit_accel_kernels.block_sparse.hopper_launch import block_sparse_hopper

    heads, tokens, dim = SHAPES[shape]
    rows = []
    for block_k in (128, 64):
        q, k, v, levels = make(heads, tokens, dim, 0.2, block_k=block_k)
        lists, pooled = to_lists(levels, block_k), remainder(k, v, levels)
        order = TokenOrder(torch.randperm(tokens, device="cuda").int()[None], torch.zeros(heads).int().cuda())
        valid = (torch.arange(tokens, device="cuda") < tokens - 200)[None]
        work = 4.0 * 128 * block_k * dim * int(levels.sum())
        call = partial(block_sparse_hopper, q, k, v, lists, scale=dim**-0.5)
        calls: dict[str, tuple[Callable[[], Any], float]] = {
            "hopper": (call, work),
            "hopper + remainder": (partial(call, pooled=pooled), work),
            "hopper + order": (partial(call, order=order), work),
            "hopper + remainder + order": (partial(call, pooled=pooled, order=order), work),
            "hopper + padding": (partial(call, key_valid=valid), work),
        }
        if tokens < 50000:
            calls[CUDNN] = (partial(dense, q, k, v), 4.0 * heads * tokens * tokens * dim)
        if block_k == 64:
            first, gather = (variants(dim)[name] for name in ("bias first", "consumers gather"))
            calls["remainder, bias first"] = (partial(call, pooled=pooled, config=first), work)
            calls["padding, bias first"] = (partial(call, key_valid=valid, config=first), work)
            calls["both, consumers gather"] = (partial(call, pooled=pooled, order=order, config=gather), work)
        rows += in_turns(shape, f"0.2 by {block_k}", calls, rounds)
    return rows


def remainder_cases(shape: str, rounds: int) -> list[Row]:
    """What a remainder alone costs at density 0.2, for key blocks of either size."""
    from dit_accel_kernels.block_sparse.hopper_launch import block_sparse_hopper

    heads, tokens, dim = SHAPES[shape]
    rows = []
    for block_k in (64, 128):
        q, k, v, levels = make(heads, tokens, dim, 0.2, block_k=block_k)
        lists, pooled = to_lists(levels, block_k), remainder(k, v, levels)
        work = 4.0 * 128 * block_k * dim * int(levels.sum())
        call = partial(block_sparse_hopper, q, k, v, lists, scale=dim**-0.5)
        calls: dict[str, tuple[Callable[[], Any], float]] = {
            "hopper": (call, work),
            "hopper + remainder": (partial(call, pooled=pooled), work),
        }
        rows += in_turns(shape, f"0.2 by {block_k}", calls, rounds)
    return rows


def auto_cases(shape: str, rounds: int) -> list[Row]:
    """Key blocks of 64 with all that an automatic method adds, at other densities; rates count exact blocks only."""
    from dit_accel_kernels.block_sparse.hopper_launch import block_sparse_hopper

    heads, tokens, dim = SHAPES[shape]
    rows = []
    for density in (0.1, 0.3):
        q, k, v, levels = make(heads, tokens, dim, density, block_k=64)
        pooled = remainder(k, v, levels)
        order = TokenOrder(torch.randperm(tokens, device="cuda").int()[None], torch.zeros(heads).int().cuda())
        work = 4.0 * 128 * 64 * dim * int(levels.sum())
        call = partial(block_sparse_hopper, q, k, v, to_lists(levels, 64), scale=dim**-0.5)
        calls: dict[str, tuple[Callable[[], Any], float]] = {
            CUDNN: (partial(dense, q, k, v), 4.0 * heads * tokens * tokens * dim),
            "hopper": (call, work),
            "hopper + remainder": (partial(call, pooled=pooled), work),
            "hopper + remainder + order": (partial(call, pooled=pooled, order=order), work),
        }
        rows += in_turns(shape, f"{density} by 64", calls, rounds)
    return rows


def short_cases(rounds: int) -> list[Row]:
    """FLUX at 1024 x 1024: eight calls in a CUDA graph, and single calls from Python with what the host takes.

    "hopper, long lists" is the kernel that longer sequences get, on the same lists, "hopper, first call" what a call takes
    that must sort the jobs first.
    """
    from dit_accel_kernels import block_sparse_attention
    from dit_accel_kernels.block_sparse.hopper_kept import forget_orders
    from dit_accel_kernels.block_sparse.hopper_launch import block_sparse_hopper

    heads, tokens, dim = FLUX_SHORT
    trust(dim)
    shape, rows = f"H{heads} S{tokens} d{dim}", []
    long_lists = replace(hopper_config(dim), short_tiles=0.0)
    for density, uneven in ((0.1, False), (0.1, True), (0.25, False), (0.25, True), (0.5, False), (1.0, False)):
        q, k, v, levels = make(heads, tokens, dim, density, uneven)
        lists, work = to_lists(levels), 4.0 * 128 * 128 * dim * int(levels.sum())
        full = 4.0 * heads * tokens * tokens * dim
        call = partial(block_sparse_hopper, q, k, v, lists, scale=dim**-0.5, return_lse=False)

        def first_call(call: Callable[[], Any] = call) -> None:
            forget_orders()
            call()

        calls: dict[str, tuple[Callable[[], Any], float]] = {
            CUDNN: (graphed(partial(dense, q, k, v)), 8 * full),
            "hopper, first call": (graphed(first_call), 8 * work),
            "hopper": (graphed(call), 8 * work),
            "hopper, long lists": (graphed(partial(call, config=long_lists)), 8 * work),
        }
        rows += in_turns(shape, f"{density}{' uneven' * uneven} graph", calls, rounds)
        if uneven:
            continue
        calls = {
            CUDNN: (partial(dense, q, k, v), full),
            "hopper": (call, work),
            "hopper, checked": (partial(block_sparse_attention, q, k, v, lists, backend="hopper"), work),
        }
        rows += in_turns(shape, f"{density} eager", calls, rounds)
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


def save(rows: list[Row]) -> None:
    """Write what there is to ``$OUT``."""
    out = os.environ.get("OUT")
    if out:
        about = environment(torch.device("cuda"))
        text = json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=1)
        Path(out, "hopper.json").write_text(text, encoding="utf-8")


def keep(run: Path, record: Path, note: str) -> None:
    """Append what a run has written to a committed record, with a note and, where that machine had no git, our commit."""
    rows = json.loads(run.read_text(encoding="utf-8"))
    if rows.get("commit") == "unknown":
        rows["commit"] = environment(torch.device("cpu"))["commit"]
    known = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {"runs": []}
    known["runs"].append({"note": note} | rows)
    partial_file = record.with_suffix(".partial")
    partial_file.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    partial_file.replace(record)


def main(argv: list[str] | None = None) -> int:
    """Gate, measure, print a table and write JSON to ``$OUT``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--warm", nargs=4, metavar=("DIM", "BLOCK_K", "FLAGS", "VARIANT"), help="only check one variant"
    )
    parser.add_argument("--warm-windows", metavar="PLAN", help="only check one plan with windows")
    parser.add_argument("--cycles", action="store_true", help="only launch, for a profiler")
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--parts", nargs="*", default=["main", "features", "short", "windows"], help="what to measure")
    parser.add_argument("--no-gate", action="store_true", help="variants were checked before")
    parser.add_argument(
        "--keep", type=Path, nargs=2, metavar=("RUN", "RECORD"), help="only append hopper.json to a record"
    )
    parser.add_argument("--note", default="", help="with --keep: what ran")
    args = parser.parse_args(argv)
    if args.keep:
        keep(*args.keep, args.note)
        return 0
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        sys.stdout.write("needs a GPU of compute capability 9.0\n")
        return 2
    if args.warm:
        return warm(int(args.warm[0]), int(args.warm[1]), args.warm[2], args.warm[3].replace("_", " "))
    if args.warm_windows:
        return warm_windows(args.warm_windows)
    if args.cycles:
        cycles()
        return 0
    began = time.monotonic()
    failed = {} if args.no_gate else gate()
    sys.stdout.write(f"gate took {time.monotonic() - began:.0f} s\n")
    for key, said in failed.items():
        sys.stdout.write(f"FAILED {key}:\n{said}\n")
    rows: list[Row] = []
    parts: list[Callable[[], list[Row]]] = []
    for shape in args.shapes:
        rounds = args.rounds if SHAPES[shape][1] < 50000 else max(2, args.rounds - 1)
        if "main" in args.parts:
            parts.append(partial(main_cases, shape, rounds))
        if "features" in args.parts and shape in ("H12 S32768 d128", "H40 S75648 d128"):
            parts.append(partial(feature_cases, shape, rounds))
        if "remainder" in args.parts:
            parts.append(partial(remainder_cases, shape, rounds))
        if "features" in args.parts and shape == "H12 S32768 d128":
            parts.append(partial(auto_cases, shape, rounds))
    once: list[Callable[[], list[Row]]] = []
    if "windows" in args.parts:
        once.append(partial(window_cases, max(2, args.rounds - 1)))
    if "short" in args.parts:
        once.append(partial(short_cases, args.rounds))
    parts[3:3] = once  # the longest sequences last, should time be short
    for part in parts:
        try:
            rows += part()
        except Exception:  # the other parts are still worth having
            traceback.print_exc(file=sys.stdout)
            failed[part.func.__name__ if isinstance(part, partial) else "part"] = "raised"
        torch.cuda.empty_cache()
        save(rows)
    report(rows)
    sys.stdout.write(f"{time.monotonic() - began:.0f} s in all\n")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
