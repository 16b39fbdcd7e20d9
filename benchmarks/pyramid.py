"""Gathered keys (pyramid levels, single columns) in the Hopper kernel, beside Triton's, exact blocks and dense cuDNN.

``PYTHONPATH=.:kernels python benchmarks/pyramid.py`` takes about two minutes on one H100 or H200. Each line is first
compared with the masked reference at a smaller size, in a process of its own (a wrong barrier hangs). Then all kernels of a
case take turns (see ``hopper.py`` for why): the Hopper kernel with gathered keys, the Triton kernel on the same call, the
Hopper kernel with exact blocks of as many keys in each row, and cuDNN. Rates are 4 * keys processed * D / time; those of
dense attention count all pairs. ``--out`` writes JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _hopper_inputs import to_lists
from _turns import CUDNN, Row, dense, in_turns, report
from torch import Tensor

from dit_accel_kernels import gathered_from_mask, pyramid
from dit_accel_kernels.pyramid import pyramid_groups
from dit_accel_kernels.types import BlockLists, GatheredKeys

SHAPES = {
    "H12 S32768 d128": (12, 32768, 128),
    "H40 S75648 d128": (40, 75648, 128),
    "H30 S17792 d64": (30, 17792, 64),
}
LONG_KINDS = ("psa .05 .10 .10 .25", "anchor .07 + .05")  # what sequences of over 50,000 tokens are timed with
BLOCKS = "hopper, exact blocks"
OURS = "hopper, gathered"
TRITON = "triton, gathered"
WARM_LIMIT_S = 60.0


@dataclass(frozen=True)
class Kind:
    """What rows look like.

    Attributes:
        exact: share of blocks that are exact.
        pooled: shares of blocks at the levels 2, 4 and 8.
        columns: share of keys that are gathered one by one, from a list for each 16 query blocks.
    """

    exact: float
    pooled: tuple[float, float, float] = (0.0, 0.0, 0.0)
    columns: float = 0.0


KINDS = {
    # Shares by rank of Pyramid Sparse Attention's CogVideoX presets, arXiv 2512.04025: 4 steps, and 1.5-5B.
    "psa .05 .10 .10 .25": Kind(0.05, (0.10, 0.10, 0.25)),
    "psa .10 .05 - .20": Kind(0.10, (0.05, 0.0, 0.20)),
    # About the anchor of AnchorAttention, arXiv 2505.23520, and its stripes.
    "anchor .07 + .05": Kind(0.07, columns=0.05),
    "columns .15": Kind(0.0, columns=0.15),
}


@dataclass(frozen=True, eq=False)
class Call:
    """Arguments of one case, and how many keys its rows have in all."""

    q: Tensor
    k: Tensor
    v: Tensor
    lists: BlockLists
    more: GatheredKeys
    equal: BlockLists
    keys: int
    equal_keys: int


def _rank(shape: tuple[int, ...], gen: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=gen, device="cuda").argsort(-1).argsort(-1)


def _columns(k: Tensor, v: Tensor, blocks: int, share: float, gen: torch.Generator) -> GatheredKeys:
    """The same number of random keys for each sixteen query blocks."""
    heads, tokens = k.shape[1:3]
    mask = _rank((1, heads, -(-blocks // 16), tokens), gen) < round(share * tokens)
    start, count, indices = gathered_from_mask(mask)
    place = torch.arange(blocks, device="cuda") // 16
    bias = torch.zeros(1, 1, tokens, device="cuda")
    return GatheredKeys(k, v, bias, start[:, :, place].contiguous(), count[:, :, place].contiguous(), indices, 1)


def make(heads: int, tokens: int, dim: int, kind: Kind) -> Call:
    """Random inputs, lists and levels; rows are equally long."""
    gen = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(1, tokens, heads, dim, generator=gen, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for _ in range(3)
    )
    blocks = -(-tokens // 128)
    rank = _rank((1, heads, blocks, blocks), gen)
    levels = torch.zeros(rank.shape, dtype=torch.uint8, device="cuda")
    end = 0.0
    for level, share in zip((1, 2, 4, 8), (kind.exact, *kind.pooled)):
        first, end = end, end + share
        levels[(rank >= round(first * blocks)) & (rank < round(end * blocks))] = level
    if kind.columns:
        more = _columns(k, v, blocks, kind.columns, gen)
    else:
        made = pyramid(k, v, block=128, backend="triton")
        more = GatheredKeys(made.k, made.v, made.bias, *gathered_from_mask(pyramid_groups(levels)), made.group)
    exact = (levels == 1).to(torch.uint8)
    keys = 128 * int(exact.sum()) + more.group * int(more.count.sum())
    each = round(keys / (128 * heads * blocks))
    equal = (rank < each).to(torch.uint8)
    return Call(q, k, v, to_lists(exact), more, to_lists(equal), keys, 128 * int(equal.sum()))


def warm(dim: int, name: str, what: str) -> int:
    """Compile what one line of a case runs, and compare it with the masked reference."""
    from dit_accel_kernels.block_sparse.hopper_launch import block_sparse_hopper
    from dit_accel_kernels.block_sparse.launch import block_sparse_triton
    from dit_accel_kernels.block_sparse.reference import block_sparse_reference
    from dit_accel_kernels.pyramid.hopper_launch import gathered_hopper

    c = make(4, 6144, dim, KINDS[name])
    scale = dim**-0.5
    lists, more = (c.equal, None) if what == BLOCKS else (c.lists, c.more)
    if what == BLOCKS:
        out, lse = block_sparse_hopper(c.q, c.k, c.v, lists, scale=scale)
    elif what == TRITON:
        out, lse = block_sparse_triton(c.q, c.k, c.v, lists, gathered=c.more, scale=scale)
    else:
        out, lse = gathered_hopper(c.q, c.k, c.v, lists, c.more, scale=scale)
    torch.cuda.synchronize()
    wide = None if more is None else replace(more, k=more.k.float(), v=more.v.float())
    want, want_lse = block_sparse_reference(c.q.float(), c.k.float(), c.v.float(), lists, scale=scale, gathered=wide)
    error = ((out.float() - want).norm() / want.norm()).item()
    off = (lse - want_lse).abs().max().item()
    sys.stdout.write(f"relative error {error:.2e}, log-sum-exp {off:.2e}\n")
    return 0 if error < 6e-3 and off < 2e-3 else 1


def gate(dims: set[int], names: list[str]) -> set[str]:
    """Warm all lines of all kinds at once; returns the kinds of which one failed."""
    running, seen = {}, set()
    for dim, name in itertools.product(dims, names):
        # Other lines are the same kernel for kinds with, and for kinds without columns.
        kernel = (dim, KINDS[name].columns > 0)
        for what in (OURS, *(() if kernel in seen else (BLOCKS, TRITON))):
            command = [sys.executable, str(Path(__file__).resolve()), "--warm", str(dim), name, what]
            pipe = subprocess.PIPE
            running[dim, name, what] = subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True)
        seen.add(kernel)
    failed, end = set(), time.monotonic() + WARM_LIMIT_S
    for (dim, name, what), process in running.items():
        try:
            said, _ = process.communicate(timeout=max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            said = "still running (hang?): " + process.communicate()[0]
        lines = [line for line in said.strip().splitlines() if line]
        sys.stdout.write(f"gate d{dim} {name:<20} {what:<26} {'; '.join(lines[-1:])[:150]}\n")
        if process.returncode:
            failed.add(name)
    return failed


def cases(shape: str, names: list[str], rounds: int) -> list[Row]:
    """All kernels on all kinds of one shape, in turns."""
    from dit_accel_kernels.block_sparse.hopper_launch import block_sparse_hopper
    from dit_accel_kernels.block_sparse.launch import block_sparse_triton
    from dit_accel_kernels.pyramid.hopper_launch import gathered_hopper

    heads, tokens, dim = SHAPES[shape]
    rows = []
    for name in names:
        if tokens > 50000 and name not in LONG_KINDS:
            continue
        c = make(heads, tokens, dim, KINDS[name])
        scale, work = dim**-0.5, 4.0 * 128 * dim
        calls: dict[str, tuple[Callable[[], Any], float]] = {
            CUDNN: (partial(dense, c.q, c.k, c.v), 4.0 * heads * tokens * tokens * dim),
            BLOCKS: (partial(block_sparse_hopper, c.q, c.k, c.v, c.equal, scale=scale), work * c.equal_keys),
        }
        ours = partial(gathered_hopper, c.q, c.k, c.v, c.lists, c.more, scale=scale)
        calls[OURS] = (ours, work * c.keys)
        run = partial(block_sparse_triton, c.q, c.k, c.v, c.lists, gathered=c.more, scale=scale)
        calls[TRITON] = (run, work * c.keys)
        if not KINDS[name].columns:
            calls["pooling alone"] = (partial(pyramid, c.k, c.v, block=128, backend="triton"), 0.0)
        rows += in_turns(shape, name, calls, rounds)
    return rows


def ratios(rows: list[Row]) -> None:
    """Rates over those of exact blocks and of cuDNN."""
    rate = {(row.shape, row.case, row.what): row.tflops for row in rows}
    for row in rows:
        if row.what.endswith("gathered") or row.what.startswith(OURS):
            of_blocks = row.tflops / rate[row.shape, row.case, BLOCKS]
            times = rate.get((row.shape, row.case, TRITON), float("nan"))
            sys.stdout.write(
                f"{row.shape:<16} {row.case:<22} {row.what:<26} of exact blocks {of_blocks:.3f}, "
                f"of triton {row.tflops / times:.2f}\n"
            )


def save(rows: list[Row], path: Path) -> None:
    """Write the record."""
    import triton

    record = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "command": "python benchmarks/pyramid.py " + " ".join(sys.argv[1:]),
        "rows": [asdict(row) for row in rows],
    }
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def main(argv: list[str] | None = None) -> int:
    """Gate, measure, print tables and write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm", nargs=3, metavar=("DIM", "KIND", "LINE"), help="only check one line")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        sys.stdout.write("needs a GPU of compute capability 9.0\n")
        return 2
    if args.warm:
        return warm(int(args.warm[0]), *args.warm[1:])
    failed = gate({SHAPES[shape][2] for shape in args.shapes}, args.kinds)
    rows: list[Row] = []
    for shape in args.shapes:
        found = cases(shape, [name for name in args.kinds if name not in failed], args.rounds)
        report(found)
        ratios(found)
        rows += found
        if args.out is not None:
            save(rows, args.out)
    return len(failed)


if __name__ == "__main__":
    raise SystemExit(main())
