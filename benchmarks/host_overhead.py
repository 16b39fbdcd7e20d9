"""What the host pays for one attention call: microseconds of Python and launches, on short sequences.

    python benchmarks/host_overhead.py [--profile] [--stub]

On a GPU the device work is so short that the host is the bound, and the time is taken before the device has finished.
Without one, or with ``--stub``, kernels are planned on the CPU and then not launched: what is left is all Python on the way
from diffusers' dispatch to the launches and back, in two columns. *engine* ends where the operators begin; *all* has the
operators' own Python, with descriptors, lists and output tensors, up to the launches themselves.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import importlib
import io
import pstats
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / part) for part in ("", "kernels", "patches", "eval", "benchmarks")]

import dit_accel  # noqa: E402
from dit_accel.presets import get_method  # noqa: E402
from dit_accel.runtime import ModelRun  # noqa: E402

CALLS, ROUNDS = 300, 9
METHODS = ("na", "adaspa", "union", "auto")


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SDPA on ``[B, S, H, D]``."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def per_call(call: Callable[[], object]) -> float:
    """Microseconds of host time of one call."""
    for _ in range(20):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    spent = time.perf_counter() - start
    torch.cuda.synchronize()
    return spent / CALLS * 1e6


def of_thread(call: Callable[[], object]) -> float:
    """Microseconds of this thread in one call, the median of some rounds."""
    found = []
    for _ in range(ROUNDS):
        start = time.thread_time_ns()
        for _ in range(CALLS):
            call()
        found.append((time.thread_time_ns() - start) / CALLS / 1e3)
    return statistics.median(found)


def sparse_call(name: str, qkv: list[Tensor], geometry: dit_accel.TokenGeometry) -> Callable[[], Tensor]:
    """A sparse step of one layer whose plan is made."""
    run = ModelRun(get_method(name), model="overhead", min_tokens=0)
    run.set_layers(("layer",))
    for step in range(3):
        run.begin_forward(geometry, dit_accel.StepInfo(step=step, steps=10))
        run.attend(*qkv, layer=0, scale=None, key_valid=None, dense=dense)
    return lambda: run.attend(*qkv, layer=0, scale=None, key_valid=None, dense=dense)


@contextlib.contextmanager
def stubbed(name: str) -> Iterator[tuple[Callable[[], object], Callable[[], Any]]]:
    """The call that diffusers makes on a sparse step, as on a Hopper GPU, without launches.

    Yields:
        The call, and what makes a context in which it ends where the operators begin.
    """
    from _e2e_models import TOY, build
    from diffusers.models.attention_dispatch import dispatch_attention_fn
    from triton.runtime.jit import JITFunction

    from dit_accel_patches.handles import enter, leave

    case = TOY["toy-wan"]
    model = build(case, case.layers, torch.device("cpu"), torch.bfloat16)
    options: dict[str, Any] = {"density": 0.3} if name in ("auto", "union", "adaspa") else {}
    blocks = {"block_q": 128, "block_k": 64 if name == "auto" else 128}
    with contextlib.ExitStack() as stack:
        # Functions, not mocks with return values: those would take longer than what is measured.
        stack.enter_context(mock.patch.object(JITFunction, "__getitem__", _no_launcher))
        for patch in (
            mock.patch("dit_accel.eligibility.choose_backend", _hopper),
            mock.patch("dit_accel_kernels.block_sparse.hopper_call.multiprocessors", _multiprocessors),
            mock.patch("torch.cuda.device", _Nowhere),
        ):
            stack.enter_context(patch)
        handle = stack.enter_context(dit_accel.enabled(model, name, min_tokens=0, warmup=0.0, **options, **blocks))
        installation = model.__dict__["_dit_accel"]
        processor = model.blocks[0].attn1.processor
        stack.callback(leave, enter(processor._dit_accel))
        installation._state.thread = threading.current_thread()
        frames, height, width = case.grid
        latents = torch.zeros(1, 4, frames, 2 * height, 2 * width)
        geometry = installation.adapter.geometry(model, (latents,), {})
        qkv = [torch.randn(1, case.tokens, case.heads, case.dim, dtype=torch.bfloat16) for _ in range(3)]

        def call() -> Tensor:
            return dispatch_attention_fn(*qkv, backend=processor._attention_backend)

        stack.enter_context(torch.no_grad())
        for step in range(4):
            installation.run.begin_forward(geometry, dit_accel.StepInfo(step=step, steps=10))
            call()
        before = handle.stats()["transformer"].sparse_calls
        stack.enter_context(mock.patch("dit_accel_kernels._common.triton_reason", _no_reason))
        call()
        yield call, lambda: _no_operators(installation, qkv)
        assert handle.stats()["transformer"].sparse_calls > before


class _Nowhere:
    """A device of CUDA where there is none."""

    def __init__(self, device: Any) -> None:
        self.device = device

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def _no_launch(*args: Any, **options: Any) -> None: ...


def _no_launcher(kernel: Any, grid: Any) -> Callable[..., None]:
    return _no_launch


def _hopper(**need: Any) -> tuple[str, dict[str, str]]:
    return "hopper", {}


def _multiprocessors(device: torch.device) -> int:
    return 132


def _no_reason(x: Tensor) -> None: ...


@contextlib.contextmanager
def _no_operators(installation: Any, qkv: list[Tensor]) -> Iterator[None]:
    """In this context the operators of the kernels do nothing but return."""
    query_mean = importlib.import_module("dit_accel.compensate.query_mean")
    plan = next(iter(installation.run._states.values())).plan
    q, k, v = (x.transpose(1, 2) for x in qkv)
    out, lse, moved = torch.zeros_like(q), torch.zeros(q.shape[:3]), None
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
        yield


def profiled(call: Callable[[], object]) -> str:
    """Where the host's time goes."""
    profile = cProfile.Profile()
    profile.runcall(lambda: [call() for _ in range(CALLS)])
    text = io.StringIO()
    pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(40)
    return text.getvalue()


def on_gpu(profile: bool) -> None:
    """Print the table of a GPU."""
    geometry = dit_accel.TokenGeometry((4, 16, 16))
    qkv = [torch.randn(1, geometry.tokens, 5, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    print(f"{torch.cuda.get_device_name()}: host time of one attention call, microseconds")
    print(f"{'dense (SDPA)':14} {per_call(lambda: dense(*qkv)):8.1f}")
    for name in METHODS:
        print(f"{name:14} {per_call(sparse_call(name, qkv, geometry)):8.1f}")
    if profile:
        call = sparse_call("auto", qkv, geometry)
        call()
        print(profiled(call))


def without_launches(profile: bool) -> None:
    """Print the table of Python alone."""
    print("host time of one attention call without launches, microseconds")
    print(f"{'':14} {'engine':>8} {'all':>8}")
    for name in METHODS:
        with stubbed(name) as (call, no_operators):
            whole = of_thread(call)
            with no_operators():
                engine = of_thread(call)
            print(f"{name:14} {engine:8.1f} {whole:8.1f}")
            if profile and name == "auto":
                print(profiled(call))


def main() -> None:
    """Print a table, and a profile of auto if asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", action="store_true", help="show where the host time of auto goes")
    parser.add_argument("--stub", action="store_true", help="no launches, as without a GPU")
    args = parser.parse_args()
    (on_gpu if torch.cuda.is_available() and not args.stub else without_launches)(args.profile)


if __name__ == "__main__":
    main()
