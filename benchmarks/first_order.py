"""What first-order terms cost in a sparse call of ``auto``: ``python benchmarks/first_order.py``, on a GPU.

First they are held against their reference on small shapes. Then whole calls with ``query_mean:64`` and with
``first_order:64`` by the same plan, and the correction with its terms alone, in a CUDA graph, take turns with dense cuDNN
attention of the same shape; the median of the rounds counts. Heads have different orders. The kernels of the correction
are listed as a profiler sees them.
Memory is what a call allocates at its peak, its output included, as a share of q, k, v and the output together.
``--toy`` runs all of it small, on a CPU if need be, without times; ``--prepare`` makes each call once, so that a later run
finds its kernels compiled.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "eval"), str(Path(__file__).parent)]

from _records import append  # noqa: E402
from _turns import CUDNN, dense, graphed, in_turns, trust  # noqa: E402
from planning import Problem, say  # noqa: E402

from dit_accel.compensate import make_compensation  # noqa: E402
from dit_accel.plan import Plan, execute  # noqa: E402
from dit_accel.planner import Planner  # noqa: E402
from dit_accel.presets import get_method  # noqa: E402
from dit_accel_kernels import block_stats, pack_bits  # noqa: E402
from dit_accel_kernels import first_order as terms  # noqa: E402
from dit_accel_kernels.types import Pooled, TokenOrder  # noqa: E402

# Heads, grid, tokens of the text, head size, blocks as `auto` has them: FLUX at 1024, 2048 and 4096, Wan 1.3B at 480p, 14B
# at 480p and 720p.
SHAPES = {
    "H24 S4608 d128": (24, (1, 64, 64), 512, 128, (64, 64)),
    "H24 S16896 d128": (24, (1, 128, 128), 512, 128, (64, 64)),
    "H24 S66048 d128": (24, (1, 256, 256), 512, 128, (64, 64)),
    "H12 S32760 d128": (12, (21, 30, 52), 0, 128, (128, 64)),
    "H40 S32760 d128": (40, (21, 30, 52), 0, 128, (128, 64)),
    "H40 S75600 d128": (40, (21, 45, 80), 0, 128, (128, 64)),
}
TOY = {"H2 S544 d64": (2, (4, 16, 8), 32, 64, (128, 64))}
SPECS = ("query_mean:64", "first_order:64")


def check(device: str) -> None:
    """Hold the terms of small shapes against the reference.

    Raises:
        SystemExit: they differ.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for dim in (128, 64):
        shape = (1, 2, 1000, dim)
        query, key, value = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
        bits = pack_bits((torch.rand(1, 2, 16, 16, device=device) < 0.2).to(torch.uint8))
        keys = block_stats(key, block=64)
        pooled = Pooled(keys.mean, block_stats(value, block=64).mean, keys.count.float().log()[:, None], bits)
        lse = 2 + torch.rand(shape[:3], device=device)
        table = torch.stack([torch.randperm(1000, device=device).int() for _ in range(2)])
        order = TokenOrder(table, torch.arange(2, dtype=torch.int32, device=device))
        settings: dict[str, Any] = {"order": order, "block_q": 64, "block_k": 64, "scale": dim**-0.5}
        parts = (query, lse, key, value, pooled)
        right, found = (
            terms.add_first_order_(torch.zeros_like(query), *parts, backend=backend, **settings).float()
            for backend in ("reference", None)
        )
        error = (found - right).norm() / right.norm()
        if not error < 0.02:
            raise SystemExit(f"first-order terms differ from their reference by {float(error):.4f}")


class Seen:
    """What the terms of a call were given."""

    def __init__(self, call: Callable[[], Any]) -> None:
        from dit_accel.compensate import first_order as engine

        real, given = engine.add_first_order_, []

        def noting(*args: Any, **options: Any) -> Tensor:
            given[:] = [(args, options)]
            return real(*args, **options)

        engine.add_first_order_ = noting
        try:
            call()
        finally:
            engine.add_first_order_ = real
        (self._out, *self._args), self._options = given[0]

    @property
    def heads(self) -> int:
        """Heads that were done at once."""
        return int(self._out.shape[1])

    def again(self) -> None:
        """Correction and terms, added to the same output again and again; sizes of values do not matter for time."""
        terms.add_first_order_(self._out, *self._args, **self._options)


def plans_of(p: Problem, blocks: tuple[int, int], density: float) -> dict[str, Plan]:
    """One plan with either compensation."""
    planner = Planner(get_method("auto").replace(block_q=blocks[0], block_k=blocks[1], pictures=()))
    order = p.order if p.geometry.grid is not None and p.geometry.grid[0] > 1 else None
    context = planner.context(p.q, p.k, p.v, None, p.geometry, density=density, scale=None, order=order)
    plan = planner.plan(context)
    return {spec: dataclasses.replace(plan, compensation=make_compensation(spec)) for spec in SPECS}


def peak(call: Callable[[], Any]) -> int:
    """Bytes that a call allocates at its peak."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def kernels(call: Callable[[], Any], times: int = 3) -> list[tuple[str, int, float]]:
    """Kernels of a call: name, how often, milliseconds together."""
    from torch.profiler import ProfilerActivity, profile

    call()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(times):
            call()
        torch.cuda.synchronize()
    rows = [(e.key, e.count // times, e.device_time_total / 1e3 / times) for e in found.key_averages()]
    return sorted((row for row in rows if row[2] > 0), key=lambda row: -row[2])


def measure(shape: str, p: Problem, blocks: tuple[int, int], args: argparse.Namespace) -> None:
    """Everything about one shape, printed and appended to the record."""
    plans = plans_of(p, blocks, args.density)
    backend = None if args.toy else "hopper" if blocks[0] == 128 else "triton"  # as a run chooses, once tested
    run = partial(execute, query=p.q, key=p.k, value=p.v, scale=None, key_valid=None)
    calls = {f"whole call, {spec}": partial(run, plan, backend=backend) for spec, plan in plans.items()}
    seen = Seen(partial(run, plans["first_order:64"], backend=None))  # not as launches alone
    alone = "correction alone" if seen.heads == p.heads else f"correction of {seen.heads} heads alone"
    if args.toy or args.prepare:
        calls[alone] = seen.again
        for name, call in calls.items():
            call()
            say(f"{name}: ran")
        return
    given = {CUDNN: (partial(dense, p.q, p.k, p.v), 1.0)} | {name: (call, 1.0) for name, call in calls.items()}
    given[alone] = (graphed(seen.again, 1), 1.0)
    times = {row.what: row.ms for row in in_turns(shape, "auto", given, args.rounds)}
    size = 4 * p.q.numel() * p.q.element_size()
    records = []
    for name, call in {**calls, alone: seen.again}.items():
        share, memory = times[name] / times[CUDNN], peak(call) / size
        records.append({"part": name, "ms": times[name], "of_dense": share, "peak_of_qkvo": memory})
        say(f"{shape:<16} {name:<32} {times[name]:>8.3f} ms {100 * share:>7.2f} % of dense ({times[CUDNN]:.3f} ms), "
            f"peak {memory:.3f} of q, k, v, o")  # fmt: skip
    for name, count, ms in kernels(seen.again)[:8]:
        records.append({"part": f"kernel {name[:60]}", "ms": ms, "of_dense": ms / times[CUDNN], "count": count})
        say(f"{shape:<16}   {name[:60]:<60} {count:>4} x {ms:>8.3f} ms {100 * ms / times[CUDNN]:>6.2f} %")
    append(args.out, shape, times[CUDNN], records, blocks=blocks, density=args.density)


def main(argv: list[str] | None = None) -> int:
    """Measure, print a table and append to a record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--toy", action="store_true", help="a tiny shape, nothing is timed")
    parser.add_argument("--prepare", action="store_true", help="compile only")
    parser.add_argument("--no-check", action="store_true", help="do not hold the terms against their reference first")
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON lines to append to")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.toy = args.toy or device.type == "cpu"
    if not args.no_check:
        check(device.type)
    for shape, (heads, grid, text, dim, blocks) in (TOY if args.toy else {s: SHAPES[s] for s in args.shapes}).items():
        if device.type == "cuda":
            trust(dim)
        measure(shape, Problem(heads, grid, text, dim, device, blocks[1]), blocks, args)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
