"""What the host pays for one sparse attention call: microseconds of this thread, on short sequences.

    python benchmarks/host_overhead.py [--methods auto adaspa] [--out benchmarks/results/host_overhead.json] [--profile]

The call is that of diffusers' dispatch on a sparse step whose plan is made. On a GPU it is launched; the device work is
short, and it waits for the device outside of what is timed. Without a GPU, or with ``--stub``, the same Python runs and
Triton launches with a driver that does nothing (:mod:`_idle_driver`). Columns:

- *all*: the whole call. ``usual`` takes every step each time; ``again`` makes the launches of an earlier call again
  (:mod:`dit_accel_kernels.replay`), ``elsewhere`` so too, for tensors at addresses not seen before; ``in C`` has them made
  by :mod:`dit_accel_kernels.native`, as in every forward call of a transformer, whatever the addresses.
- *engine*: from diffusers to where the operators begin, and back (with operators that return at once).
- *launches*: Triton's launcher in C and the driver, for all launches of a call.
- *torch*: its allocations for results and what stands between kernels.
- *diffusers*: its dispatch of a call, with a backend that returns at once.
- *ours*: *again* less launches, torch and diffusers.
- *compiled*: a region compiled by inductor that has nothing but our operator, and *body*: that less launches and a region
  whose operator allocates its output in Python and returns; both with our Python on the way, and *in C* (*C body*).
- *arming*: what a forward call of a transformer pays once for each of its layers, so that they are made in C.
- *python*: 400 turns of a loop that adds, which says how fast the machine runs Python at that moment.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import ctypes
import importlib
import io
import json
import os
import pstats
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / part) for part in ("", "kernels", "patches", "eval", "benchmarks")]

from _compiled_regions import compiled_regions  # noqa: E402
from _e2e_models import TOY, build  # noqa: E402
from _idle_driver import idle_driver, idle_native, why_not  # noqa: E402
from _timing import environment  # noqa: E402

import dit_accel  # noqa: E402
import dit_accel.replayed  # noqa: E402
from dit_accel_eval.files import write_json  # noqa: E402
from dit_accel_kernels import backends, native, query_means  # noqa: E402
from dit_accel_patches import op  # noqa: E402

ROUNDS, CALLS = 41, 20
METHODS = ("na", "radial", "adaspa", "union", "auto")
_ELSEWHERE = 12  # sets of tensors in turns, more than addresses are remembered
_IN_C = ("in C", "compiled in C", "C body", "arming")
_LAYERS, _FREE = 40, 10_000  # of a large model, and numbers that no layer has here


@dataclass(frozen=True)
class Sparse:
    """A sparse call: what makes it, for each of some sets of tensors, the like with an idle backend, and who serves it."""

    calls: tuple[Callable[[], Tensor], ...]
    idle: Callable[[], Tensor]
    installation: Any
    qkv: list[Tensor]


def of_thread(calls: tuple[Callable[[], object], ...]) -> float:
    """Microseconds of this thread in one call, the calls in turns: the lower quartile of some rounds."""
    return in_turns((_nothing, calls))[0]


def in_turns(*cases: tuple[Callable[[], object], tuple[Callable[[], object], ...]]) -> list[float]:
    """Microseconds of this thread in one call of each case, the lower quartile of rounds in which each has its turn.

    Whoever shares the core with us, or its caches, makes rounds longer and none shorter.

    Args:
        cases: what is done before a turn, which is not timed, and calls to be made in turns.
    """
    found: list[list[float]] = [[] for _ in cases]
    for _ in range(ROUNDS):
        for (prepare, calls), spent in zip(cases, found, strict=True):
            prepare()
            _wait()
            start = time.thread_time_ns()
            for i in range(CALLS):
                calls[i % len(calls)]()
            spent.append((time.thread_time_ns() - start) / CALLS / 1e3)
    return [statistics.quantiles(spent, n=4)[0] for spent in found]


def pure_python() -> int:
    """Something whose time says how fast this machine runs Python at the moment."""
    total = 0
    for i in range(400):
        total += i
    return total


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextlib.contextmanager
def sparse(name: str, device: torch.device) -> Iterator[Sparse]:
    """A sparse call of a method on the first layer of a small Wan, as on a Hopper GPU."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    from dit_accel_patches.handles import enter, leave

    case = TOY["toy-wan"]
    model = build(case, case.layers, device, torch.bfloat16)
    options: dict[str, Any] = {"density": 0.3} if name in ("auto", "union", "adaspa", "radial") else {}
    blocks = {"block_q": 128, "block_k": 64 if name == "auto" else 128}
    with contextlib.ExitStack() as stack:
        if device.type == "cpu":
            stack.enter_context(_as_on_hopper())
        handle = stack.enter_context(dit_accel.enabled(model, name, min_tokens=0, warmup=0.0, **options, **blocks))
        installation = model.__dict__["_dit_accel"]
        processor = model.blocks[0].attn1.processor
        stack.callback(leave, enter(processor._dit_accel))
        installation._state.thread = threading.current_thread()
        frames, height, width = case.grid
        latents = torch.zeros(1, 4, frames, 2 * height, 2 * width)
        geometry = installation.adapter.geometry(model, (latents,), {})
        shape = (1, case.tokens, case.heads, case.dim)
        sets = [[torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(3)] for _ in range(_ELSEWHERE)]

        def call(qkv: list[Tensor]) -> Callable[[], Tensor]:
            return lambda: dispatch_attention_fn(*qkv, backend=processor._attention_backend)

        calls = tuple(call(qkv) for qkv in sets)
        stack.enter_context(torch.no_grad())
        for step in range(4):
            installation.run.begin_forward(geometry, dit_accel.StepInfo(step=step, steps=10))
            calls[0]()
        before = handle.stats()["transformer"].sparse_calls
        if device.type == "cpu":
            stack.enter_context(idle_native())
            stack.enter_context(mock.patch("dit_accel_kernels._common.triton_reason", _nothing))
            stack.enter_context(mock.patch.object(dit_accel.replayed, "_EVERYWHERE", True))
        for _ in range(6):
            calls[0]()
        yield Sparse(calls, _idle(processor._attention_backend, sets[0]), installation, sets[0])
        assert handle.stats()["transformer"].sparse_calls > before


@contextlib.contextmanager
def _as_on_hopper() -> Iterator[None]:
    """In this context tensors of the CPU are served as on a Hopper GPU, by a driver that does nothing."""
    launch = "dit_accel_kernels.query_means.hopper_launch."
    with contextlib.ExitStack() as stack:
        stack.enter_context(idle_driver())
        stack.enter_context(mock.patch.dict(os.environ))
        os.environ.pop("DIT_ACCEL_BACKEND", None)
        # Functions, not mocks with return values: those would take longer than what is measured.
        for patch in (
            mock.patch("dit_accel.eligibility.choose_backend", _hopper),
            mock.patch("dit_accel_kernels.block_sparse.hopper_call.multiprocessors", _multiprocessors),
            mock.patch("dit_accel_kernels.block_sparse.launch._arch", _architecture),
            mock.patch(launch + "multiprocessors", _multiprocessors),
            mock.patch(launch + "capability", _capability),
            mock.patch("dit_accel_kernels.query_means.self_test", _nothing),
            mock.patch("torch.cuda.device", _Nowhere),
        ):
            stack.enter_context(patch)
        yield


def _idle(backend: Any, qkv: list[Tensor]) -> Callable[[], Tensor]:
    """The call that diffusers makes, to a backend that returns at once."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    def nothing(**given: Any) -> Any:
        return given["query"]

    def call() -> Tensor:
        real = Registry._backends[backend]
        Registry._backends[backend] = nothing
        try:
            return dispatch_attention_fn(*qkv, backend=backend)
        finally:
            Registry._backends[backend] = real

    return call


class _Nowhere:
    """A device of CUDA where there is none."""

    def __init__(self, device: Any) -> None:
        self.device = device

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def _keep_memory() -> None:
    """Have malloc give the same addresses again and again, as the allocator for CUDA does."""
    libc = ctypes.CDLL(None)
    for option, limit in ((-3, 1 << 30), (-1, (1 << 31) - 1)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
        libc.mallopt(option, limit)


def _nothing(*_: Any) -> None: ...


def _hopper(**need: Any) -> tuple[str, dict[str, str]]:
    return "hopper", {}


def _multiprocessors(device: torch.device) -> int:
    return 132


def _architecture(device: torch.device) -> str:
    return "sm_90"


def _capability(x: Tensor) -> int:
    return 90


@contextlib.contextmanager
def _no_replays(found: Sparse) -> Iterator[None]:
    """In this context every call takes the usual way."""
    with (
        mock.patch.object(dit_accel.replayed, "_BACKENDS", frozenset()),
        mock.patch.object(dit_accel.replayed.PlanReplays, "again", _nothing),
        mock.patch.object(found.installation._state, "again", None),
        mock.patch("dit_accel.runtime.settled", _nothing),
    ):
        yield


@contextlib.contextmanager
def _no_operators(found: Sparse) -> Iterator[None]:
    """In this context the operators of the kernels do nothing but return."""
    query_mean = importlib.import_module("dit_accel.compensate.query_mean")
    plan = next(iter(found.installation.run._states.values())).plan
    q, k, v = (x.transpose(1, 2) for x in found.qkv)
    out, lse, moved = torch.zeros_like(q), torch.zeros(q.shape[:3], device=q.device), None
    if plan.key_order is not None:
        moved = dit_accel.plan.permute_and_pool(k, v, plan.key_order, block=plan.mask.block_k)
    stubs: dict[Any, dict[str, Any]] = {
        dit_accel.plan: {
            "run_backend": lambda *args, **options: (out, lse),
            "permute_and_pool": lambda *args, **options: moved,
            "permute_tokens": lambda x, order: x,
        },
        query_mean: {
            "mean_query_residual": lambda *args, **options: lse,
            "add_query_means_": lambda out, rows, **options: out,
        },
    }
    with contextlib.ExitStack() as stack:
        for module, names in stubs.items():
            stack.enter_context(mock.patch.multiple(module, **names))
        stack.enter_context(_no_replays(found))
        yield


def _outside(found: Sparse) -> tuple[float, float, int]:
    """Microseconds of launches and of allocations of a call, and the number of launches; 0 where nothing is replayed."""
    plan = next(iter(found.installation.run._states.values())).plan
    bound = None if plan.replays is None else next(iter(plan.replays.replays._bound.values()), None)
    if bound is None:
        return 0.0, 0.0, 0
    program, ready = bound.program, next(iter(bound._ready.values()))

    def launches() -> None:
        for start, args in ready:
            start(*args)

    def memory() -> list[Tensor]:
        device, made = program.device, [torch.empty_like(found.qkv[0])]
        for shape, steps, dtype in program.results[1:]:
            made.append(torch.empty_strided(shape, steps, dtype=dtype, device=device))
        return made + [torch.empty(size, dtype=torch.uint8, device=device) for size in program.rooms]

    held = [found.calls[0](), memory()]  # what the arguments point to may be gone; nothing of it is looked at
    spent = of_thread((launches,)), of_thread((memory,))
    del held
    return *spent, len(ready)


def _in_c(found: Sparse, launches: float) -> dict[str, float]:
    """The call in the hands of C, and a compiled region with it in those of Python and of C; 0 what is not possible."""
    run, state = found.installation.run, found.installation._state
    module, (region, nothing) = native.native(), compiled_regions(found.qkv)

    def by_python() -> None:
        run.disarm()
        if module is not None:
            module.set_body(op._attend)

    def by_c() -> None:
        by_python()
        op.arm(state)
        module.set_body(_no_python)  # a call that goes there is no call in C

    op.arm(state)
    if not run._armed._now:
        print(f"not in C: {native.why_not() or 'the call is not settled'}")
        compiled, empty = in_turns((by_python, (region,)), (_nothing, (nothing,)))
        return {"compiled": compiled, "body": compiled - empty - launches} | dict.fromkeys(_IN_C, 0.0)
    try:
        alone = in_turns((by_c, found.calls))[0]
        compiled, empty, in_c = in_turns((by_python, (region,)), (_nothing, (nothing,)), (by_c, (region,)))
    finally:
        by_python()
    spent = {"compiled": compiled, "body": compiled - empty - launches}
    return spent | dict(zip(_IN_C, (alone, in_c, in_c - empty - launches, _arming(run)), strict=True))


def _no_python(*_: Any) -> Any:
    raise AssertionError("the operator's body in Python was called")


def _arming(run: Any) -> float:
    """Microseconds a layer of a forward call of as many layers as large models have, when all calls are settled."""
    (where, settled), kept = next(iter(run._settled.items())), dict(run._settled)
    numbers = {layer: _FREE + layer for layer in range(_LAYERS)}
    run._settled.update({(where[0], layer): settled for layer in numbers})

    def arming() -> None:
        run.arm(numbers)
        run.disarm()

    try:
        return of_thread((arming,)) / _LAYERS
    finally:
        run._settled.clear()
        run._settled.update(kept)


def measured(name: str, device: torch.device, profile: bool) -> dict[str, Any]:
    """One row of the table."""
    with sparse(name, device) as found:
        row: dict[str, Any] = {"method": name, "again": of_thread(found.calls[:1]), "elsewhere": of_thread(found.calls)}
        row["settled"] = bool(found.installation.run._settled)
        row["launches"], row["torch"], row["kernels"] = _outside(found)
        row["diffusers"] = of_thread((found.idle,))
        row.update(_in_c(found, row["launches"]))
        with _no_replays(found):
            found.calls[0]()
            row["usual"] = of_thread(found.calls[:1])
        with _no_operators(found):
            row["engine"] = of_thread(found.calls[:1])
        row["ours"] = row["again"] - row["launches"] - row["torch"] - row["diffusers"]
        row["python"] = of_thread((pure_python,))
        row["replayed"] = bool(row["kernels"])
        if profile:
            print(profiled(found.calls[0]))
    return row


def profiled(call: Callable[[], object]) -> str:
    """Where the host's time goes."""
    profile = cProfile.Profile()
    profile.runcall(lambda: [call() for _ in range(300)])
    text = io.StringIO()
    pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(40)
    return text.getvalue()


def _wide(column: str) -> int:
    return max(10, len(column) + 2)


def main() -> None:
    """Print a table, and append it to a record if asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=METHODS, help="presets")
    parser.add_argument("--stub", action="store_true", help="a driver that does nothing, on the CPU")
    parser.add_argument("--no-self-test", action="store_true", help="take kernels without their self-test")
    parser.add_argument("--profile", action="store_true", help="show where the host time of the methods goes")
    parser.add_argument("--out", type=Path, help="JSON record to append to")
    args = parser.parse_args()
    idle = args.stub or not torch.cuda.is_available()
    reason = why_not() if idle else None
    if reason is not None:
        parser.error(f"no idle driver: {reason}")
    if idle:
        _keep_memory()
    device = torch.device("cpu" if idle else "cuda")
    if args.no_self_test:
        backends.self_test = query_means.self_test = _nothing  # type: ignore[assignment]
    columns = ("again", "elsewhere", "in C", "usual", "engine", "launches", "torch", "diffusers", "ours", "compiled")
    columns += ("body", "compiled in C", "C body", "arming", "python")
    print("host time of one sparse attention call, microseconds" + (", idle driver" if idle else ""))
    print(f"{'':10}" + "".join(f"{column:>{_wide(column)}}" for column in columns) + "   kernels")
    rows: list[dict[str, Any]] = []
    before = json.loads(args.out.read_text()) if args.out is not None and args.out.exists() else []
    for name in args.methods:
        row = measured(name, device, args.profile)
        figures = "".join(f"{row[column]:{_wide(column)}.1f}" for column in columns)
        print(f"{name:10}{figures}{row['kernels']:10}", flush=True)
        rows.append(row)
        if args.out is not None:
            write_json(args.out, [*before, {**environment(device), "driver": "idle" if idle else "CUDA", "rows": rows}])


if __name__ == "__main__":
    main()
