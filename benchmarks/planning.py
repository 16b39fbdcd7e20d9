"""What planning costs beside one dense attention, and how much memory a call takes: ``python benchmarks/planning.py``.

All parts take turns with dense cuDNN attention of the same shape; the median of the rounds counts. The parts are those of
a plan by exact mass (the preset ``union``): block mass, choice among six axis orders by recalled mass, selection and lists,
once on all queries and once on 16 of each block; then the planner itself, for the presets ``union`` and ``auto``, and its
parts for ``auto``. ``--parts auto adaspa --block-k 64`` times what ``auto`` does with its own blocks and the exact mass of
``adaspa``, and nothing else. Grids of one frame are planned by the form that a preset has for pictures, in its blocks;
what such a plan keeps of the output besides, a sparse call's work, is timed by itself. Memory is what a call allocates at
its peak over what is there before and the output, as a share of q, k, v and the output together. Parts of a few
milliseconds are timed in a CUDA graph besides, without the host. What was measured is printed and appended to ``--out`` as
it comes.
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
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "eval"), str(Path(__file__).parent)]

from _records import append  # noqa: E402
from _turns import CUDNN, dense, graphed, in_turns, timed, trust  # noqa: E402

from dit_accel.choice import CHOICES  # noqa: E402
from dit_accel.choice._registry import fixed_order, sampled_rows  # noqa: E402
from dit_accel.compensate import make_compensation  # noqa: E402
from dit_accel.compensate.residual import without_residual  # noqa: E402
from dit_accel.geometry import TokenGeometry  # noqa: E402
from dit_accel.order import token_order  # noqa: E402
from dit_accel.planner import Planner  # noqa: E402
from dit_accel.presets import get_method  # noqa: E402
from dit_accel.score import block_scores  # noqa: E402
from dit_accel_kernels import (  # noqa: E402
    block_mass,
    block_sparse_attention,
    dense_attention,
    lists_from_levels,
    permute_and_pool,
    permute_tokens,
)
from dit_accel_kernels.lists import pack_bits  # noqa: E402
from dit_accel_kernels.types import Pooled, TokenOrder  # noqa: E402

# Heads, grid, tokens of the text in the same sequence, head size. The second is Wan 14B at 720p, the third at 480p, then
# FLUX at 1024, 2048 and 4096 pixels squared; the last is CogVideoX.
SHAPES = {
    "H12 S32768 d128": (12, (32, 32, 32), 0, 128),
    "H40 S75600 d128": (40, (21, 45, 80), 0, 128),
    "H40 S32760 d128": (40, (21, 30, 52), 0, 128),
    "H24 S4608 d128": (24, (1, 64, 64), 512, 128),
    "H24 S16896 d128": (24, (1, 128, 128), 512, 128),
    "H24 S66048 d128": (24, (1, 256, 256), 512, 128),
    "H48 S17776 d64": (48, (13, 30, 45), 226, 64),
}
TOY = {"H4 S1040 d128": (4, (16, 8, 8), 16, 128), "H4 S272 d128": (4, (1, 16, 16), 16, 128)}
BLOCK_Q, DENSITY, SAMPLE = 128, 0.2, 16
SHORT_MS = 3.0  # up to which the host may take longer than the GPU


class Problem:
    """Random tensors of one shape and the orders that ``auto`` chooses from."""

    def __init__(
        self, heads: int, grid: tuple[int, int, int], text: int, dim: int, device: torch.device, block_k: int
    ) -> None:
        self.geometry, self.heads = TokenGeometry(grid, prefix=text), heads
        # One frame: ``auto`` has a form for pictures, with blocks of its own.
        auto = get_method("auto").fitting(self.geometry)
        self.block_q, self.block_k = (auto.block_q, auto.block_k) if grid[0] == 1 else (BLOCK_Q, block_k)
        shape = (1, self.geometry.tokens, heads, dim)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.q, self.k, self.v = (torch.randn(shape, device=device, dtype=dtype).transpose(1, 2) for _ in range(3))
        self.out, self.lse = dense_attention(self.q, self.k, self.v)
        names = ("fhw", "fwh", "hwf", "hfw", "whf", "wfh")
        first = token_order(names, torch.zeros(1, dtype=torch.int32), self.geometry)
        assert first is not None
        self.table = first.table.to(device)
        self.order = TokenOrder(self.table, torch.arange(heads, device=device, dtype=torch.int32) % len(names))
        self.rows = sampled_rows(-(-self.geometry.tokens // self.block_q), device)

    def mass(self, *, order: TokenOrder | None = None, k: Tensor | None = None, **more: Any) -> Tensor:
        """Block mass of all or some rows."""
        keys = self.k if k is None else k
        return block_mass(self.q, keys, self.lse, block_q=self.block_q, block_k=self.block_k, order=order, **more)

    def recall(self, sample: int | None) -> Tensor:
        """What the choice of orders looks at: block mass of some rows under each candidate."""
        found = []
        for i in range(self.table.shape[0]):
            order = fixed_order(self.table[i : i + 1], self.heads)
            mass = self.mass(order=order, k=permute_tokens(self.k, order), rows=self.rows, sample=sample)
            kept = mass.topk(max(round(DENSITY * mass.shape[-1]), 1), dim=-1).values
            found.append(kept.sum(-1).mean((0, 2)))
        return torch.stack(found).argmax(0)

    def select(self, mass: Tensor) -> Any:
        """The best blocks of each row as lists."""
        best = mass.topk(max(round(DENSITY * mass.shape[-1]), 1), dim=-1).indices
        levels = torch.zeros(mass.shape, dtype=torch.uint8, device=mass.device).scatter_(3, best, 1)
        return lists_from_levels(levels, self.block_q, self.block_k, capacity=best.numel()), levels

    def planned(self, sample: int | None) -> Any:
        """All of it."""
        order = TokenOrder(self.table, self.recall(sample).int())
        return self.select(self.mass(order=order, k=permute_tokens(self.k, order), sample=sample))

    def planner(self, preset: str) -> Callable[[], Any]:
        """The planner of a preset, as a run calls it."""
        planner = self._planner(preset)
        return lambda: planner.plan(self._context(planner))

    def _planner(self, preset: str, keeps: bool = False) -> Planner:
        method = get_method(preset).fitting(self.geometry)
        compensate = method.compensate if keeps else without_residual(method.compensate)
        return Planner(replace(method, block_q=self.block_q, block_k=self.block_k, compensate=compensate))

    def _context(self, planner: Planner, order: TokenOrder | None = None) -> Any:
        options: dict[str, Any] = {"density": DENSITY, "scale": None, "order": order}
        ctx = planner.context(self.q, self.k, self.v, self.lse, self.geometry, **options)
        ctx.dense_out = self.out  # plans that keep what sparse attention lacks are made at dense steps
        return ctx

    def parts_of_auto(self) -> dict[str, Callable[[], Any]]:
        """What the planner of ``auto`` does, one after the other."""
        planner = self._planner("auto")
        layout = planner.layout(self.geometry, self.q.device)
        choice = planner.method.order_choice
        ctx = self._context(planner, self.order)
        scores = block_scores(ctx)
        levels, capacity = planner._select(ctx, layout.names, scores)
        mass, keeping = self._planner("adaspa"), self._planner("auto", keeps=True)
        kept: dict[str, Callable[[], Any]] = {}
        if keeping.method.compensate != planner.method.compensate:
            plan = planner.plan(self._context(planner, self.order))
            compensation = make_compensation(keeping.method.compensate)
            kept["auto: what is kept, a sparse call"] = lambda: compensation.settle(ctx, plan)
        return {
            "adaspa: exact mass": lambda: block_scores(self._context(mass)),
            "auto: choice of orders": lambda: CHOICES.create(choice, self._context(planner), layout.table),
            "auto: scores": lambda: block_scores(self._context(planner, self.order)),
            "auto: selection": lambda: planner._select(ctx, layout.names, scores),
            "auto: bits, lists and density": lambda: planner._complete(ctx, layout.names, levels, scores, capacity),
            "auto: a later plan": lambda: planner.plan(self._context(planner, self.order)),
            **kept,
        }


def parts(p: Problem) -> dict[str, Callable[[], Any]]:
    """Everything that is timed, by name."""
    mass = p.mass()
    moved = permute_tokens(p.k, p.order)
    calls: dict[str, Callable[[], Any]] = {
        "dense with log-sum-exp": lambda: dense_attention(p.q, p.k, p.v),
        "block mass": p.mass,
        "block mass, order": lambda: p.mass(order=p.order, k=moved),
        f"block mass, {SAMPLE} of {p.block_q}": lambda: p.mass(sample=SAMPLE),
        "choice of orders": lambda: p.recall(None),
        f"choice of orders, {SAMPLE} of {p.block_q}": lambda: p.recall(SAMPLE),
        "permute k": lambda: permute_tokens(p.k, p.order),
        "permute and pool k, v": lambda: permute_and_pool(p.k, p.v, p.order, block=p.block_k),
        "select and list": lambda: p.select(mass),
        "plan, all queries": lambda: p.planned(None),
        f"plan, {SAMPLE} of {p.block_q}": lambda: p.planned(SAMPLE),
        "planner of union": p.planner("union"),
        "planner of auto": p.planner("auto"),
        **p.parts_of_auto(),
    }
    if p.q.is_cuda:
        calls["block mass, triton"] = lambda: p.mass(backend="triton")
        from dit_accel_kernels.dense import _with_lse

        calls["dense with log-sum-exp, cudnn"] = lambda: _with_lse("cudnn", p.q, p.k, p.v, p.q.shape[3] ** -0.5, None)
    return calls


def memory(p: Problem) -> dict[str, float]:
    """Peak memory of some calls beyond inputs and output, as a share of q, k, v and the output."""
    lists, levels = p.select(p.mass())
    pool = permute_and_pool(p.k, p.v, p.order, block=p.block_k)
    bias = (
        pool.count.float().log()[:, None].contiguous() if pool.count.ndim == 2 else pool.count.float().log()[None, None]
    )
    pooled = Pooled(pool.mean_k, pool.mean_v, bias, pack_bits(levels))
    calls: dict[str, Callable[[], Any]] = {
        "sparse": lambda: block_sparse_attention(p.q, p.k, p.v, lists),
        "sparse + remainder": lambda: block_sparse_attention(p.q, p.k, p.v, lists, pooled=pooled),
        "sparse + remainder + order of queries": lambda: block_sparse_attention(
            p.q, pool.k, pool.v, lists, pooled=pooled, order=p.order
        ),
        "permute and pool k, v": lambda: permute_and_pool(p.k, p.v, p.order, block=p.block_k),
        "dense with log-sum-exp": lambda: dense_attention(p.q, p.k, p.v),
        "block mass": p.mass,
    }
    whole, found = 4 * p.q.numel() * p.q.element_size(), {}
    for name, call in calls.items():
        call()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = call()
        torch.cuda.synchronize()
        out = 0 if name == "permute and pool k, v" or name == "block mass" else p.q.numel() * p.q.element_size()
        found[name] = (torch.cuda.max_memory_allocated() - before - out) / whole
        del kept
    return found


def toy(device: torch.device, block_k: int) -> int:
    """Run every part once at a tiny size; on a GPU all kernels are then compiled."""
    if device.type == "cuda":
        trust(128)
    for shape in TOY.values():
        p = Problem(*shape, device, block_k)
        for name, call in parts(p).items():
            call()
            sys.stdout.write(f"{name}: ran\n")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Measure, print a table and append to a record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--toy", action="store_true", help="a tiny shape, nothing is timed")
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES)[:2], choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--block-k", type=int, default=128)
    parser.add_argument("--parts", nargs="*", help="only parts whose name contains one of these, and no memory")
    parser.add_argument("--out", type=Path, help="JSON lines to append to")
    args = parser.parse_args(argv)
    if args.toy or not torch.cuda.is_available():
        return toy(torch.device("cuda" if torch.cuda.is_available() else "cpu"), args.block_k)
    for shape in args.shapes:
        measure(shape, args)
    return 0


def measure(shape: str, args: argparse.Namespace) -> None:
    """Time the parts of one shape, in turns with dense attention."""
    heads, grid, text, dim = SHAPES[shape]
    trust(dim)
    p = Problem(heads, grid, text, dim, torch.device("cuda"), args.block_k)
    chosen = {name: (call, 1.0) for name, call in parts(p).items() if wanted(name, args.parts)}
    attend = {CUDNN: (partial(dense, p.q, p.k, p.v), 1.0)}
    times = {row.what: row.ms for row in in_turns(shape, f"{p.block_q}x{p.block_k}", attend | chosen, args.rounds)}
    rows: list[dict[str, Any]] = []
    for name in [name for name in chosen if name in times]:  # a part that failed has said so
        share = times[name] / times[CUDNN]
        rows.append({"part": name, "ms": times[name], "of_dense": share})
        say(f"{shape:<16} {name:<32} {times[name]:>8.3f} ms {share:>7.3f} of dense ({times[CUDNN]:.3f} ms)")
        if times[name] < SHORT_MS:
            alone = on_the_gpu(name, chosen[name][0])
            rows[-1] |= {} if alone is None else {"gpu_ms": alone, "gpu_of_dense": alone / times[CUDNN]}
    peaks = memory(p) if args.parts is None else {}
    for name, share in peaks.items():
        say(f"{shape:<16} peak memory, {name:<40} {100 * share:>6.2f} %")
    blocks = {"block_q": p.block_q, "block_k": p.block_k, "density": DENSITY}
    append(args.out, shape, times[CUDNN], rows, **blocks, **({"peak_memory": peaks} if peaks else {}))


def on_the_gpu(name: str, call: Callable[[], Any], times: int = 8) -> float | None:
    """Milliseconds of a call without its Python, as part of a CUDA graph; ``None`` where none can be made of it."""
    try:
        found = float(timed(graphed(call, times))) / times
    except RuntimeError as error:
        say(f"{name}: no graph, {str(error)[:100]}")
        return None
    say(f"{name}: {found:.3f} ms on the GPU alone")
    return found


def wanted(name: str, asked: list[str] | None) -> bool:
    """Whether a part is to be timed."""
    return asked is None or any(part in name for part in asked)


def say(text: str) -> None:
    """Print at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
