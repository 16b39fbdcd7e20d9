"""Measure tile shapes of the Triton kernel on one GPU; what runs and how it is timed can be replaced, for tests."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..block_sparse.configs import TileConfig, tile_config
from ..lists import lists_from_levels, pack_bits
from ..types import BlockLists, Pooled, TokenOrder
from .candidates import candidates
from .store import TileEntry

__all__ = ["Case", "Outcome", "Problem", "make_problem", "tune_case"]

_TOLERANCE = 2e-2
Run = Callable[["Problem", TileConfig], Tensor]
Timer = Callable[[Callable[[], Any]], float]


@dataclass(frozen=True)
class Case:
    """What one entry of a table is for."""

    head_dim: int
    dtype: torch.dtype
    block_q: int
    block_k: int

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"head_dim {self.head_dim}, {kind}, blocks {self.block_q} x {self.block_k}"


@dataclass(frozen=True)
class Outcome:
    """What the measurements of a case gave.

    Attributes:
        case: what was measured.
        default: the shape that the shipped table gives.
        default_ms: its milliseconds.
        best: the fastest shape.
        best_ms: its milliseconds.
        tried: shapes that ran and were right.
        failed: shapes that did not compile, did not fit or gave other numbers.
    """

    case: Case
    default: TileConfig
    default_ms: float
    best: TileConfig
    best_ms: float
    tried: int
    failed: int

    @property
    def gain(self) -> float:
        """How many times faster than the shipped shape; 1 where that is the best."""
        return self.default_ms / self.best_ms

    def entry(self) -> TileEntry:
        """The line of a measured table."""
        c, b = self.case, self.best
        size = c.dtype.itemsize
        return TileEntry(
            c.head_dim, size, b.block_m, b.block_n, b.num_warps, b.num_stages, b.tma, None, c.block_q, c.block_k,
            round(self.best_ms, 5), round(self.default_ms, 5),
        )  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """A call as the presets make it: an order of queries, a fifth of the blocks, the rest as means."""

    q: Tensor
    k: Tensor
    v: Tensor
    lists: BlockLists
    order: TokenOrder
    pooled: Pooled


def make_problem(
    case: Case, device: torch.device, *, heads: int = 8, tokens: int = 8192, density: float = 0.2
) -> Problem:
    """Random tensors ``[1, H, S, D]`` as views of ``[1, S, H, D]`` and random lists; the same each time."""
    gen = torch.Generator(device).manual_seed(0)

    def draw(count: int) -> Tensor:
        x = torch.randn(1, count, heads, case.head_dim, generator=gen, device=device)
        return x.to(case.dtype).transpose(1, 2)

    q, k, v = draw(tokens), draw(tokens), draw(tokens)
    qb, kb = -(-tokens // case.block_q), -(-tokens // case.block_k)
    keep = max(1, round(density * kb))
    best = torch.rand(1, heads, qb, kb, generator=gen, device=device).topk(keep, -1).indices
    levels = torch.zeros(1, heads, qb, kb, dtype=torch.uint8, device=device).scatter_(3, best, 1)
    table = torch.rand(1, tokens, generator=gen, device=device).argsort(-1).int()
    order = TokenOrder(table, torch.zeros(heads, dtype=torch.int32, device=device))
    bias = torch.full((1, 1, kb), float(case.block_k), device=device).log()
    mean_k, mean_v = draw(kb).contiguous(), draw(kb).contiguous()
    lists = lists_from_levels(levels, case.block_q, case.block_k)
    return Problem(q, k, v, replace(lists, partial=None), order, Pooled(mean_k, mean_v, bias, pack_bits(levels)))


def _run(problem: Problem, config: TileConfig) -> Tensor:
    from ..block_sparse.launch import block_sparse_triton

    p = problem
    return block_sparse_triton(
        p.q, p.k, p.v, p.lists, scale=p.q.shape[3] ** -0.5, order=p.order, pooled=p.pooled, config=config,
        return_lse=False,
    )[0]  # fmt: skip


def event_timer(call: Callable[[], Any]) -> float:
    """Median milliseconds of a call on the current GPU."""
    for _ in range(3):
        call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(15)]
    for start, stop in events:
        start.record()
        call()
        stop.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in events)


def tune_case(
    case: Case,
    device: torch.device,
    arch: str,
    *,
    shared_limit: int,
    tma: bool,
    timer: Timer = event_timer,
    run: Run = _run,
    shapes: Iterable[TileConfig] | None = None,
    say: Callable[[str], None] = lambda _: None,
    **size: int,
) -> Outcome:
    """Time every candidate of a case against the shipped shape.

    A candidate must give the numbers of the shipped shape within rounding; one that does not compile or fit is passed over.
    The best of the first pass is timed once more in turns with the shipped one, and must still be faster.

    Args:
        case: what to measure.
        device: where.
        arch: as in :func:`~dit_accel_kernels.block_sparse.configs.tile_config`.
        shared_limit: bytes of shared memory that one program may have.
        tma: whether the GPU has tensor descriptors.
        timer: milliseconds of a call.
        run: makes the call with a shape.
        shapes: candidates, by default those of :func:`~.candidates.candidates`.
        say: told about each candidate.
        size: ``heads`` and ``tokens`` of the problem.

    Raises:
        RuntimeError: the shipped shape itself does not run.
    """
    problem = make_problem(case, device, **size)
    default = tile_config(arch, case.head_dim, case.dtype.itemsize, case.block_q, case.block_k)
    try:
        want = run(problem, default)
        default_ms = timer(lambda: run(problem, default))
    except Exception as error:
        raise RuntimeError(f"{default} does not run for {case}: {type(error).__name__}: {error}") from error
    best, best_ms, tried, failed = default, default_ms, 1, 0
    if shapes is None:
        shapes = candidates(
            case.head_dim, case.dtype.itemsize, case.block_q, case.block_k, shared_limit=shared_limit, tma=tma
        )
    for config in shapes:
        if config == default:
            continue
        try:
            right = _agree(run(problem, config), want)
            ms = timer(lambda c=config: run(problem, c)) if right else float("inf")  # type: ignore[misc]
        except Exception as error:  # out of registers or shared memory, or the compiler gives up
            right, ms = False, float("inf")
            say(f"{config}: {type(error).__name__}")
        tried, failed = tried + right, failed + (not right)
        if right:
            say(f"{config}: {ms:.3f} ms")
        if ms < best_ms:
            best, best_ms = config, ms
    if best != default:
        again = [(timer(lambda: run(problem, default)), timer(lambda: run(problem, best))) for _ in range(3)]
        default_ms, best_ms = (statistics.median(times) for times in zip(*again))
        if best_ms >= default_ms:
            best, best_ms = default, default_ms
    return Outcome(case, default, default_ms, best, best_ms, tried, failed)


def _agree(got: Tensor, want: Tensor) -> bool:
    worst = (got.float() - want.float()).abs().max().item()
    return worst <= _TOLERANCE  # and not NaN
