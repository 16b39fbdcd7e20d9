"""Where the time of one sparse call of ``auto`` goes, beside dense attention: ``python benchmarks/auto_call.py``, on a GPU.

The parts are what :func:`dit_accel.plan.execute` does for a plan of the preset, each on the same tensors: keys and values
into the order of their head with the means of their blocks, block-sparse attention with these means as further keys (the
kernel gathers queries and scatters outputs), mean queries, their attention to all keys less that of the sparse call, and
the sum with the output. Heads have different orders. All take turns with dense cuDNN attention; the median counts.
``--toy`` runs all of it small, on a CPU if need be, and times nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "eval"), str(Path(__file__).parent)]

from _records import append  # noqa: E402
from _turns import CUDNN, dense, in_turns, trust  # noqa: E402
from planning import Problem, say  # noqa: E402

from dit_accel.plan import Plan, execute  # noqa: E402
from dit_accel.planner import Planner  # noqa: E402
from dit_accel.presets import get_method  # noqa: E402
from dit_accel_kernels import block_sparse_attention, permute_and_pool  # noqa: E402
from dit_accel_kernels.query_means import add_query_means_, mean_queries, mean_query_residual  # noqa: E402
from dit_accel_kernels.types import Pooled  # noqa: E402

# Wan 14B at 720p and at 480p, Wan 1.3B at 480p, CogVideoX; heads, grid, tokens of the text, head size.
SHAPES = {
    "H40 S75600 d128": (40, (21, 45, 80), 0, 128),
    "H40 S32760 d128": (40, (21, 30, 52), 0, 128),
    "H12 S32760 d128": (12, (21, 30, 52), 0, 128),
    "H48 S17776 d64": (48, (13, 30, 45), 226, 64),
}
TOY = {"H4 S1024 d64": (4, (16, 8, 8), 0, 64)}


def plan_of(p: Problem, blocks: tuple[int, int], density: float) -> Plan:
    """The plan that ``auto`` makes at this density, with an order for each head."""
    planner = Planner(replace(get_method("auto"), block_q=blocks[0], block_k=blocks[1]))
    context = planner.context(p.q, p.k, p.v, None, p.geometry, density=density, scale=None, order=p.order)
    return planner.plan(context)


def parts(p: Problem, plan: Plan) -> dict[str, Callable[[], Any]]:
    """Everything that is timed, by name."""
    block_q, block_k = plan.mask.block_q, plan.mask.block_k
    assert plan.key_order is not None
    moved = permute_and_pool(p.k, p.v, plan.key_order, block=block_k)
    pooled = Pooled(moved.mean_k, moved.mean_v, moved.count.float().log()[:, None], plan.mask.bits)
    lists, scale = plan.mask.lists(), p.q.shape[3] ** -0.5
    each = min(int(get_method("auto").compensate.partition(":")[2] or block_q), block_q)  # queries of a mean
    bits = pooled.bits.repeat_interleave(block_q // each, dim=2)[:, :, : -(-p.q.shape[2] // each)].contiguous()
    of_means = replace(pooled, bits=bits)
    shape: dict[str, Any] = {"order": plan.order, "block_q": each}
    settings: dict[str, Any] = {**shape, "block_k": block_k, "scale": scale}
    rows = mean_query_residual(p.q, moved.k, moved.v, of_means, **settings)
    out = torch.zeros_like(p.q)
    attend = partial(block_sparse_attention, p.q, moved.k, moved.v, lists, scale=scale, return_lse=False)
    return {
        "whole call": lambda: execute(plan, p.q, p.k, p.v, scale=None, key_valid=None, backend=None),
        "order and pool k, v": lambda: permute_and_pool(p.k, p.v, plan.key_order, block=block_k),
        "block-sparse, remainder, order": lambda: attend(pooled=pooled, order=plan.order),
        "block-sparse alone": attend,
        "mean queries": lambda: mean_queries(p.q, **shape),
        "correction, means included": lambda: mean_query_residual(p.q, moved.k, moved.v, of_means, **settings),
        "sum with the output": lambda: add_query_means_(out, rows, **shape),
    }


def main(argv: list[str] | None = None) -> int:
    """Measure, print a table and append to a record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--toy", action="store_true", help="a tiny shape, nothing is timed")
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--blocks", nargs=2, type=int, default=(128, 64), metavar=("Q", "K"))
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON lines to append to")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    toy = args.toy or device.type == "cpu"
    for shape, (heads, grid, text, dim) in TOY.items() if toy else ((s, SHAPES[s]) for s in args.shapes):
        if device.type == "cuda":
            trust(dim)
        p = Problem(heads, grid, text, dim, device, args.blocks[1])
        plan = plan_of(p, tuple(args.blocks), args.density)
        calls = parts(p, plan)
        if toy:
            for name, call in calls.items():
                call()
                say(f"{name}: ran")
            continue
        attend = {CUDNN: (partial(dense, p.q, p.k, p.v), 1.0)}
        turns = in_turns(shape, "auto", attend | {name: (call, 1.0) for name, call in calls.items()}, args.rounds)
        times, records = {row.what: row.ms for row in turns}, []
        for name in calls:
            share = times[name] / times[CUDNN]
            records.append({"part": name, "ms": times[name], "of_dense": share})
            say(f"{shape:<16} {name:<32} {times[name]:>8.3f} ms {100 * share:>7.2f} % of dense ({times[CUDNN]:.3f} ms)")
        append(args.out, shape, times[CUDNN], records, blocks=args.blocks, density=args.density)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
