"""Our kernels beside cuDNN, flash, FlexAttention, flash-attn-4 and comfy-kitchen: ``python benchmarks/kernels.py``.

A peer that cannot be imported is a line with the reason. comfy-kitchen chooses its blocks itself, as many as asked for.

First a correctness gate: nothing is timed until every kernel agrees with its reference and, with everything kept, with
dense attention. ``--toy`` runs the same code at tiny sizes on a CPU, where the times mean nothing.

TFLOP/s is ``4 H S^2 d density / time``, so at an equal rate the speed-up over dense is 1 / density.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "kernels"), str(Path(__file__).parent)]

from _timing import Result, append_csv, environment, measure  # noqa: E402
from flash4_object import object_call, why_no_object  # noqa: E402

import dit_accel_kernels as dk  # noqa: E402

DENSITIES = (1.0, 0.5, 0.25, 0.2, 0.1)
SHAPES = ((12, 32768, 128), (24, 16896, 128), (24, 4608, 128), (30, 17792, 64), (40, 75648, 128))
TOY_SHAPES = ((2, 384, 64), (1, 500, 72))
# Root mean square of the difference over that of the reference; bfloat16 has 8 bits of mantissa.
GATE = {torch.bfloat16: 1e-2, torch.float32: 1e-4}


def say(text: str) -> None:
    """Print at once, so that a run that is cut off still shows what it had."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


@dataclass
class Problem:
    """Tensors of one shape, ``[1, H, S, D]`` views of a ``[1, S, H, D]`` model."""

    q: Tensor
    k: Tensor
    v: Tensor
    order: dk.TokenOrder
    block_q: int
    block_k: int

    @classmethod
    def make(
        cls, heads: int, tokens: int, dim: int, device: torch.device, dtype: torch.dtype, block_q: int, block_k: int
    ) -> Problem:
        """Random tensors and two random orders that the heads share."""
        q, k, v = (torch.randn(1, tokens, heads, dim, device=device, dtype=dtype).transpose(1, 2) for _ in range(3))
        table = torch.stack([torch.randperm(tokens, device=device) for _ in range(2)]).int()
        order = dk.TokenOrder(table, torch.arange(heads, device=device, dtype=torch.int32) % 2)
        return cls(q, k, v, order, block_q, block_k)

    def levels(self, density: float, block_q: int, block_k: int) -> Tensor:
        """uint8 ``[1, H, Qb, Kb]`` with the same number of random blocks in each row."""
        heads, tokens = self.q.shape[1:3]
        qb, kb = -(-tokens // block_q), -(-tokens // block_k)
        kept = max(1, round(density * kb))
        scores = torch.rand(1, heads, qb, kb, device=self.q.device)
        chosen = scores.topk(kept, sorted=False).indices
        return torch.zeros(scores.shape, dtype=torch.uint8, device=self.q.device).scatter_(3, chosen, 1)

    def pooled(self, levels: Tensor) -> dk.Pooled:
        """The remainder of a mask as mean keys and values."""
        mean_k, _, count = dk.block_stats(self.k, block=self.block_k)
        mean_v = dk.block_stats(self.v, block=self.block_k).mean
        return dk.Pooled(mean_k, mean_v, count.log()[:, None].contiguous(), dk.pack_bits(levels))


def error(got: Tensor, want: Tensor) -> float:
    """Root mean square of the difference over that of the reference."""
    got, want = got.double(), want.double()
    return float((got - want).square().mean().sqrt() / want.square().mean().sqrt().clamp(min=1e-9))


def gate(device: torch.device, dtype: torch.dtype, block_q: int, block_k: int) -> list[str]:
    """Compare every kernel with its reference at a small ragged shape; what failed, with its error."""
    failures = []
    for dim in (64, 128):
        p = Problem.make(3, 1008, dim, device, dtype, block_q, block_k)
        levels = p.levels(0.3, block_q, block_k)
        lists, every = (dk.lists_from_levels(x, block_q, block_k) for x in (levels, torch.ones_like(levels)))
        dense, lse = dk.dense_attention(p.q, p.k, p.v)
        sparse = dk.block_sparse_attention
        pairs: dict[str, tuple[Any, Any]] = {"density 1 = dense": (sparse(p.q, p.k, p.v, every), dense)}
        for name, extra in {
            "sparse": {},
            "pooled": {"pooled": p.pooled(levels)},
            "ordered": {"order": p.order},
        }.items():
            want = sparse(p.q, p.k, p.v, lists, backend="reference", **extra)
            pairs[name] = sparse(p.q, p.k, p.v, lists, **extra), want
            if error(want, dense) < 5 * GATE[dtype]:
                failures.append(f"d{dim} {name}: the mask does not show, so the comparison proves nothing")
        blocks = {"block_q": block_q, "block_k": block_k, "order": p.order}
        pairs["mass"] = (
            dk.block_mass(p.q, p.k, lse, **blocks),
            dk.block_mass(p.q, p.k, lse, **blocks, backend="reference"),
        )
        pairs["lse"] = dk.attention_lse(p.q, p.k), dk.attention_lse(p.q, p.k, backend="reference")
        pairs["dense lse"] = lse, pairs["lse"][1]
        pairs["stats"] = (
            dk.block_stats(p.k, block=block_k).mean,
            dk.block_stats(p.k, block=block_k, backend="reference").mean,
        )
        pools = [dk.permute_and_pool(p.k, p.v, p.order, block=block_k, backend=b) for b in (None, "reference")]
        pairs |= {f"pool {name}": (getattr(pools[0], name), getattr(pools[1], name)) for name in ("k", "v", "mean_k")}
        pairs["round trip"] = dk.unpermute_tokens(dk.permute_tokens(p.v, p.order), p.order), p.v
        for name, (got, want) in pairs.items():
            measured = error(got, want)
            if not measured < GATE[dtype]:
                failures.append(f"d{dim} {name}: error must be below {GATE[dtype]}, got {measured:.2g}")
    return failures


def dense_with(backend: SDPBackend, p: Problem) -> Callable[[], Tensor]:
    """Dense attention by one named kernel of torch."""

    def call() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(p.q, p.k, p.v)

    return call


def flex(p: Problem, density: float) -> Callable[[], Tensor] | str:
    """Compiled FlexAttention on whole blocks of 128, none of which evaluates a mask function; or why it cannot be had."""
    try:
        from torch.nn.attention.flex_attention import BlockMask, flex_attention
    except ImportError as problem:
        return str(problem)
    tokens = p.q.shape[2]
    levels = p.levels(density, 128, 128)
    count = levels.sum(3, dtype=torch.int32)
    index = levels.argsort(dim=3, descending=True, stable=True).int()
    none, nowhere, size = torch.zeros_like(count), torch.zeros_like(index), (128, 128)
    mask = BlockMask.from_kv_blocks(none, nowhere, count, index, BLOCK_SIZE=size, seq_lengths=(tokens, tokens))
    compiled = _compiled(flex_attention)
    q, k, v = (x.contiguous() for x in (p.q, p.k, p.v))
    return lambda: compiled(q, k, v, block_mask=mask)


def flash4(p: Problem, density: float) -> Callable[[], Any] | str:
    """Block-sparse flash-attn-4 on whole blocks of 128; or why it cannot be had."""
    from dit_accel_kernels.block_sparse.flash4 import block_sparse_flash4, flash4_lists

    dim, tokens = p.q.shape[3], p.q.shape[2]
    where = {"device": p.q.device, "dtype": p.q.dtype, "head_dim": dim, "block_q": 128, "block_k": 128}
    reason = dk.why_not("flash4", **where)
    if reason is None and tokens % 128:
        reason = f"needs a multiple of 128 tokens, got {tokens}"
    without = why_no_object(dim, p.q.dtype, tokens) if p.q.is_cuda else "needs CUDA"
    if reason is not None and without is not None:
        return f"{reason}; compiled ahead: {without}"
    lists = dk.lists_from_levels(p.levels(density, 128, 128), 128, 128)
    if reason is None:
        return lambda: block_sparse_flash4(p.q, p.k, p.v, lists, scale=dim**-0.5)
    return object_call(p.q, p.k, p.v, *flash4_lists(lists, tokens // 128))


def comfy_kitchen(p: Problem, density: float) -> Callable[[], Any] | str:
    """comfy-kitchen's INT8 attention over the best blocks, its choice included; or why it cannot be had."""
    if importlib.util.find_spec("comfy_kitchen") is None:
        return "comfy-kitchen is not installed"
    if not p.q.is_cuda or p.q.shape[3] != 128:
        return f"needs CUDA and a head size of 128, got {p.q.device} and {p.q.shape[3]}"
    module = importlib.import_module("comfy_kitchen")
    q, k, v = (x.transpose(1, 2).contiguous() for x in (p.q, p.k, p.v))
    return lambda: module.sol_attn(q, k, v, topk_ratio=density)


def _compiled(function: Callable[..., Any], cache: dict[Any, Any] = {}) -> Any:  # noqa: B006 - the cache is the point
    if function not in cache:
        cache[function] = torch.compile(function, dynamic=False)
    return cache[function]


def contestants(p: Problem, cuda: bool, with_flex: bool) -> Iterator[tuple[str, str, float, Callable[[], Any] | str]]:
    """Name, backend, density and either the call or the reason why there is none."""
    for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        yield "dense", name, 1.0, dense_with(backend, p) if cuda else "needs CUDA"
    if not cuda:
        yield "dense", "sdpa", 1.0, lambda: F.scaled_dot_product_attention(p.q, p.k, p.v)
    for density in DENSITIES:
        levels = p.levels(density, p.block_q, p.block_k)
        lists = dk.lists_from_levels(levels, p.block_q, p.block_k)
        pooled = p.pooled(levels)
        yield "sparse", "ours", density, lambda a=lists: dk.block_sparse_attention(p.q, p.k, p.v, a)
        if density < 1:
            call = lambda a=lists, b=pooled: dk.block_sparse_attention(p.q, p.k, p.v, a, pooled=b)  # noqa: E731
            yield "sparse+pooled", "ours", density, call
        if density in (0.5, 0.25, 0.1):
            reason = "needs CUDA" if not cuda else "only at two shapes, to save compile time (--flex)"
            yield "sparse", "flex", density, flex(p, density) if cuda and with_flex else reason
        if density < 1:
            yield "sparse", "flash4", density, flash4(p, density)
            yield "sparse", "comfy", density, comfy_kitchen(p, density)
    lse = dk.attention_lse(p.q, p.k)
    blocks = {"block_q": p.block_q, "block_k": p.block_k}
    rows = torch.linspace(0, -(-p.q.shape[2] // p.block_q) - 1, 16, device=p.q.device).int()
    moved = dk.permute_and_pool(p.k, p.v, p.order, block=p.block_k)
    yield "dense_attention", dk.dense_kernel(p.q, p.k, p.v), 1.0, lambda: dk.dense_attention(p.q, p.k, p.v)
    yield "attention_lse", "ours", 1.0, lambda: dk.attention_lse(p.q, p.k)
    yield "block_mass", "ours", 1.0, lambda: dk.block_mass(p.q, p.k, lse, **blocks)
    yield "block_mass+order", "ours", 1.0, lambda: dk.block_mass(p.q, moved.k, lse, **blocks, order=p.order)
    yield "block_mass 16 rows", "ours", 1.0, lambda: dk.block_mass(p.q, p.k, lse, **blocks, rows=rows)
    sample = p.block_q // 8
    yield f"block_mass {sample} each", "ours", 1.0, lambda: dk.block_mass(p.q, p.k, lse, **blocks, sample=sample)
    yield "block_stats", "ours", 1.0, lambda: dk.block_stats(p.k, block=p.block_k)
    yield "permute_tokens", "ours", 1.0, lambda: dk.permute_tokens(p.k, p.order)
    yield "permute_and_pool", "ours", 1.0, lambda: dk.permute_and_pool(p.k, p.v, p.order, block=p.block_k)


def run_shape(p: Problem, with_flex: bool, deadline: float, about: dict[str, str], results: list[Result]) -> int:
    """Time every contestant and append to ``results``; returns how many of our own calls failed."""
    heads, tokens, dim = p.q.shape[1:]
    shape = f"B1 H{heads} S{tokens} d{dim} {p.block_q}x{p.block_k}"
    say(
        f"\n{shape}\n{'what':<20} {'backend':<10} {'density':>7} {'ms':>9} {'TFLOP/s':>8} {'x cuDNN':>8} {'of dense':>8}"
    )
    failed, baseline = 0, float("nan")
    for name, backend, density, call in contestants(p, p.q.is_cuda, with_flex):
        line = f"{name:<20} {backend:<10} {density:>7.2f}"
        if isinstance(call, str) or time.monotonic() > deadline:
            say(f"{line}  {call if isinstance(call, str) else 'time budget spent'}")
            continue
        try:
            timing = measure(call, p.q.device, 0.2)
        except Exception as problem:  # a peer that cannot run here is a line of the table, not the end of it
            failed += backend == "ours" or name == "dense_attention"
            say(f"{line}  {type(problem).__name__}: {' '.join(str(problem).split())[:150]}")
            continue
        ms = timing.p50_ms
        baseline = ms if backend in ("cudnn", "sdpa") and name == "dense" else baseline
        rate = 4e-9 * heads * tokens**2 * dim * density / ms
        ratio = baseline / ms
        say(f"{line} {ms:>9.3f} {rate:>8.0f} {ratio:>8.2f} {ms / baseline:>8.3f}")
        times = (timing.p20_ms, ms, timing.p80_ms)
        results.append(Result(name, backend, shape, density, *times, rate, ratio, **about))
    return failed


def main() -> int:
    """Gate, measure, print and append to the CSV."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--toy", action="store_true", help="tiny shapes on the CPU, nothing appended")
    parser.add_argument("--blocks", default="128x64", help="queries x keys of a block")
    parser.add_argument("--shapes", default="", help="only shapes that contain this text, for example S4608")
    parser.add_argument("--flex", action="store_true", help="FlexAttention at every shape; each compiles anew")
    parser.add_argument("--budget", type=float, default=90.0, help="seconds after which nothing more is timed")
    parser.add_argument("--csv", type=Path, default=Path(__file__).with_name("results.csv"))
    args = parser.parse_args()
    deadline = time.monotonic() + args.budget
    toy = args.toy or not torch.cuda.is_available()
    if toy and not args.toy:
        say("no CUDA device: toy sizes on the CPU, the times mean nothing")
    device = torch.device("cpu" if toy else "cuda")
    dtype = torch.float32 if toy else torch.bfloat16
    block_q, block_k = (int(n) for n in args.blocks.split("x"))
    torch.manual_seed(0)
    about = environment(device)
    say(" | ".join(about.values()))
    failures = gate(device, dtype, block_q, block_k)
    if failures:
        say("correctness gate FAILED, nothing was timed:\n  " + "\n  ".join(failures))
        return 1
    where = {"device": device, "dtype": dtype, "head_dim": 128, "block_q": block_q, "block_k": block_k}
    chosen, reasons = dk.choose_backend(**where)
    say(f"correctness gate passed; block-sparse backend {chosen}" + "".join(f"; {n}: {r}" for n, r in reasons.items()))
    failed = 0
    for heads, tokens, dim in TOY_SHAPES if toy else SHAPES:
        if args.shapes not in f"H{heads} S{tokens} d{dim}":
            continue
        p = Problem.make(heads, tokens, dim, device, dtype, block_q, block_k)
        with_flex = args.flex or (tokens, dim) in ((32768, 128), (17792, 64))
        results: list[Result] = []
        try:
            failed += run_shape(p, with_flex, deadline, about, results)
        except Exception:  # what was timed before is kept, and the other shapes are tried
            failed += 1
            traceback.print_exc()
        if not toy:
            append_csv(args.csv, results)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
