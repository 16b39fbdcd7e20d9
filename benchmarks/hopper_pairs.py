"""The Hopper kernel for query blocks of 64 beside our Triton kernel, that for blocks of 128 and dense attention.

``PYTHONPATH=.:kernels:benchmarks python benchmarks/hopper_pairs.py`` on one H100 or H200. What neighbouring query blocks
share of their lists decides how much is fetched: masks are random with a stated share of common blocks, or those of real
plans (``--plans``). All kernels of a case take turns (``hopper.py`` says why) at equal density; each variant must first
agree with the masked reference in a process of its own, which also fills Triton's cache.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _hopper_inputs import make, remainder, to_lists
from _records import append
from _turns import CUDNN, Row, dense, graphed, in_turns, report
from torch import Tensor

from dit_accel_kernels.block_sparse.hopper_pairs_launch import pair_lists
from dit_accel_kernels.block_sparse.hopper_pairs_specs import PairsConfig, pairs_config
from dit_accel_kernels.lists import lists_from_levels, pack_bits, unpack_bits
from dit_accel_kernels.types import BlockLists, TokenOrder

WARM_LIMIT_S = 40.0
SHAPES = {
    "H12 S32768 d128": (12, 32768, 128),
    "H24 S16896 d128": (24, 16896, 128),
    "H24 S65536 d128": (24, 65536, 128),
    "H24 S4608 d128": (24, 4608, 128),
    "H30 S17792 d64": (30, 17792, 64),
}


def variants(dim: int) -> dict[str, PairsConfig]:
    """The configurations to compare, the default first."""
    base = pairs_config(dim)
    tile = 192 - base.tile  # the other one
    return {"pairs": base, f"pairs, tiles of {tile}": replace(base, tile=tile, stages=base.stages * base.tile // tile)}


def pair_levels(
    heads: int, tokens: int, density: float, share: float, block_k: int = 64, uneven: bool = False
) -> Tensor:
    """Levels ``[1, H, Qb, Kb]`` for query blocks of 64, ``share`` of each row being the same as in its neighbour's."""
    gen = torch.Generator("cuda").manual_seed(1)
    qb, kb = -(-tokens // 64), -(-tokens // block_k)
    pairs = (qb + 1) // 2
    keep = torch.full((1, heads, pairs, 1), max(1.0, density * kb), device="cuda")
    if uneven:  # exponential lengths: their standard deviation is about their mean
        keep = keep * torch.empty_like(keep).exponential_(generator=gen)
    keep = keep.round().clamp(1, kb)
    common = torch.rand(1, heads, pairs, kb, generator=gen, device="cuda").argsort(-1).argsort(-1)
    levels = []
    for _ in range(2):
        own = torch.rand(1, heads, pairs, kb, generator=gen, device="cuda")
        own = torch.where(common < (share * keep).round(), common - kb, own)
        levels.append(own.argsort(-1).argsort(-1) < keep)
    return torch.stack(levels, 3).flatten(2, 3)[:, :, :qb].to(torch.uint8)


def shared_by_neighbours(levels: Tensor) -> float:
    """What part of the visits of neighbouring rows is of blocks that both visit."""
    rows = levels[:, :, : levels.shape[2] // 2 * 2].bool().unflatten(2, (-1, 2))
    return 2.0 * float(rows.all(3).sum()) / max(1.0, float(rows.sum()))


def lists_of(levels: Tensor, block_k: int = 64) -> BlockLists:
    return replace(lists_from_levels(levels, 64, block_k, capacity=int(levels.sum())), partial=None)


def warm(dim: int, name: str) -> int:
    """Compile a variant and compare it with the reference."""
    from dit_accel_kernels.block_sparse.hopper_pairs_launch import block_sparse_pairs
    from dit_accel_kernels.block_sparse.reference import block_sparse_reference

    q, k, v, _ = make(3, 6144, dim, 0.2)
    lists = lists_of(pair_levels(3, 6144, 0.2, 0.5, uneven=True))
    scale = dim**-0.5
    out, lse = block_sparse_pairs(q, k, v, lists, scale=scale, config=variants(dim)[name])
    torch.cuda.synchronize()
    want, want_lse = block_sparse_reference(q.float(), k.float(), v.float(), lists, scale=scale)
    error = ((out.float() - want).norm() / want.norm()).item()
    off = (lse - want_lse).abs().max().item()
    sys.stdout.write(f"relative error {error:.2e}, log-sum-exp {off:.2e}\n")
    return int(not (error < 6e-3 and off < 2e-3))


def gate(dims: tuple[int, ...]) -> set[tuple[int, str]]:
    """Warm all variants at once; which of them passed."""
    running = {}
    for dim in dims:
        for name in variants(dim):
            command = [sys.executable, str(Path(__file__).resolve()), "--warm", str(dim), name]
            running[dim, name] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    passed, end = set(), time.monotonic() + WARM_LIMIT_S
    for key, process in running.items():
        try:
            said, _ = process.communicate(timeout=max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            said = "still running (hang?): " + process.communicate()[0]
        lines = [line for line in said.strip().splitlines() if line]
        sys.stdout.write(f"gate {key!s:<36} {'; '.join(lines[-2:])[:300]}\n")
        if process.returncode == 0:
            passed.add(key)
    sys.stdout.flush()
    return passed


def cases(
    shape: str,
    densities: list[float],
    shares: list[float],
    rounds: int,
    passed: set[tuple[int, str]],
    out: Path | None,
) -> None:
    """Random masks of one shape; the kernel for blocks of 128 has key blocks of 64 as well."""
    from dit_accel_kernels.block_sparse.hopper_launch import block_sparse_hopper
    from dit_accel_kernels.block_sparse.hopper_pairs_launch import block_sparse_pairs
    from dit_accel_kernels.block_sparse.launch import block_sparse_triton

    heads, tokens, dim = SHAPES[shape]
    scale = dim**-0.5
    for density in densities:
        q, k, v, wide = make(heads, tokens, dim, density, block_k=64)
        calls: dict[str, tuple[Callable[[], Any], float]] = {
            CUDNN: (partial(dense, q, k, v), 4.0 * heads * tokens * tokens * dim),
            "hopper, blocks of 128": (
                partial(block_sparse_hopper, q, k, v, to_lists(wide, 64), scale=scale),
                4.0 * 128 * 64 * dim * int(wide.sum()),
            ),
        }
        for i, share in enumerate(shares):
            levels = pair_levels(heads, tokens, density, share)
            lists, work = lists_of(levels), 4.0 * 64 * 64 * dim * int(levels.sum())
            found = shared_by_neighbours(levels)
            if i == 0:
                calls["triton"] = (partial(block_sparse_triton, q, k, v, lists, scale=scale), work)
            for name, config in variants(dim).items():
                if (dim, name) in passed and (i == 0 or name == "pairs"):
                    call = partial(block_sparse_pairs, q, k, v, lists, scale=scale, config=config)
                    calls[f"{name} {found:.2f}"] = (call, work)
            if i == 0:
                calls["lists of pairs alone"] = (
                    partial(pair_lists, lists, tokens, tile=pairs_config(dim).tile),
                    work,
                )
        kind = "random"
        if tokens < 8192:  # else the host's time would count
            kind = "random, eight calls in a graph"
            del calls["lists of pairs alone"]
            calls = {name: (graphed(call), 8.0 * work) for name, (call, work) in calls.items()}
        tell(in_turns(shape, f"{density}", calls, rounds), out, kind=kind)


def tell(rows: list[Row], out: Path | None, **settings: Any) -> None:
    """Print the rows of a case and append them to a record."""
    report(rows)
    sys.stdout.flush()
    dense_ms = next(row.ms for row in rows if row.what == CUDNN)
    records = [
        {"part": row.what, "ms": row.ms, "of_dense": row.ms / dense_ms, "tflops": row.tflops, "lowest": row.lowest}
        | {"highest": row.highest}
        for row in rows
    ]
    append(out, rows[0].shape, dense_ms, records, density=rows[0].case, **settings)


def load_plan(path: str, heads: int) -> Tensor:
    """Levels that ``--save-plans`` has written, repeated to that number of heads."""
    saved = torch.load(path, map_location="cuda", weights_only=True)
    levels = unpack_bits(saved["bits"], saved["kb"])
    return levels.repeat(1, -(-heads // levels.shape[1]), 1, 1)[:, :heads].contiguous()


def save_plans(folder: Path, density: float) -> None:
    """Write the masks of real plans, which take longer to make than to use."""
    from _pair_plans import flux_levels, wan_levels

    device = "cuda" if torch.cuda.is_available() else "cpu"
    makers = {
        "tiny_wan_17x32x32": partial(wan_levels, (17, 32, 32)),
        "tiny_flux_128x128": partial(flux_levels, 128),
        "tiny_flux_256x256": partial(flux_levels, 256),
    }
    for name, make_levels in makers.items():
        levels = make_levels(density, 6, device)
        torch.save({"bits": pack_bits(levels).cpu(), "kb": levels.shape[3]}, folder / f"{name}.pt")
        sys.stdout.write(f"{name}: density {levels.float().mean().item():.3f}\n")
        sys.stdout.flush()


def plan_cases(paths: list[str], rounds: int, out: Path | None) -> None:
    """Masks of real plans with random tensors: alone, and with the remainder and an order for each head as ``auto`` has."""
    from dit_accel_kernels.block_sparse.hopper_pairs_launch import block_sparse_pairs
    from dit_accel_kernels.block_sparse.launch import block_sparse_triton

    heads, dim = 24, 128
    for path in paths:
        label, levels = Path(path).stem, load_plan(path, heads)
        tokens, rows_of = 64 * levels.shape[2], levels.sum(3).float()
        both = rows_of[:, :, : levels.shape[2] // 2 * 2].unflatten(2, (-1, 2))
        uneven = ((both[..., 0] - both[..., 1]).abs().mean() / both.mean()).item()
        share, found = shared_by_neighbours(levels), levels.float().mean().item()
        sys.stdout.write(
            f"{label}: density {found:.3f}, shared by neighbours {share:.2f}, their lengths differ by {uneven:.2f}, "
            f"lengths vary by {(rows_of.std() / rows_of.mean()).item():.2f}\n"
        )
        q, k, v, _ = make(heads, tokens, dim, found)
        lists, pooled = lists_of(levels), remainder(k, v, levels)
        order = TokenOrder(
            torch.stack([torch.randperm(tokens, device="cuda") for _ in range(heads)]).int(),
            torch.arange(heads, device="cuda").int(),
        )
        work = 4.0 * 64 * 64 * dim * int(levels.sum())
        calls: dict[str, tuple[Callable[[], Any], float]] = {
            CUDNN: (partial(dense, q, k, v), 4.0 * heads * tokens * tokens * dim)
        }
        for name, run in (("triton", block_sparse_triton), ("pairs", block_sparse_pairs)):
            call = partial(run, q, k, v, lists, scale=dim**-0.5)
            calls[name] = (call, work)
            calls[f"{name} + remainder + order"] = (partial(call, pooled=pooled, order=order), work)
        calls["lists of pairs alone"] = (partial(pair_lists, lists, tokens, tile=64), work)
        shape = f"H{heads} S{tokens} d{dim}"
        facts = {"shared": share, "lengths_differ": uneven, "heads": heads}
        tell(in_turns(shape, f"{found:.3f}", calls, rounds), out, kind=label, **facts)


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--warm"]:
        return warm(int(arguments[1]), arguments[2])
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), help="names of shapes")
    parser.add_argument("--densities", type=float, nargs="*", default=[0.5, 0.25, 0.1])
    parser.add_argument(
        "--shares", type=float, nargs="*", default=[0.7, 0.0, 1.0], help="what neighbours have in common"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON lines to append to")
    parser.add_argument("--plans", nargs="*", default=[], help="files of real plans")
    parser.add_argument("--save-plans", type=Path, help="write files of real plans into this folder, and nothing else")
    parser.add_argument("--density", type=float, default=0.2, help="of the plans that are written")
    asked = parser.parse_args(arguments)
    if asked.save_plans is not None:
        save_plans(asked.save_plans, asked.density)
        return 0
    passed = gate(tuple({SHAPES[name][2] for name in asked.shapes}))
    for shape in asked.shapes:
        cases(shape, asked.densities, asked.shares, asked.rounds, passed, asked.out)
    plan_cases(asked.plans, asked.rounds, asked.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
