"""One full-size transformer: dense compiled against ours compiled, step by step."""

from __future__ import annotations

import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from _e2e_models import Case, build, inputs
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import dit_accel

__all__ = ["FIXED", "METHODS", "Subject", "measure_case", "warm"]

#: Compared methods. Each head keeps as many blocks as any other, so the work is the density whatever the maps. The last
#: two say what we cost: everything kept, reordered and with the pooled remainder, and our hook around dense attention.
METHODS: dict[str, dict[str, Any]] = {
    "plain": {"method": None, "score": "mass", "select": "top_k", "warmup": 0.0},
    "union": {"method": "union", "warmup": 0.0},
    "auto": {"method": "auto", "refresh": (), "warmup": 0.0},
    "kept": {"method": "union", "warmup": 0.0},
    "hooked": {"method": "auto", "warmup": 1.0},
}
#: Methods whose density is not the one asked for.
FIXED = {"kept": 1.0, "hooked": 1.0}
_OWN_BLOCKS = ("auto", "hooked")
PLANS = (
    "random weights give flat maps; every head keeps the same number of blocks (top_k_head, top_k), so the work is the "
    "density whatever the maps are; the plan is made at one step from that step's queries and keys, by the method's own "
    "scores, and used in those that are timed, without a refresh; the exact share is such that exact blocks and remainder "
    "together are the density"
)
STEPS = 50
_ATTENTION = re.compile(r"sdpa|flash_fprop|fmha|flash_fwd|_scaled_dot_product_flash_attention_for_cpu")
_DENSE_ROUNDS, _SPARSE_ROUNDS = 3, 3


@dataclass
class Subject:
    """A model under test.

    Attributes:
        case: what it is.
        layers: blocks of each list that were built.
        block: tokens in a block of queries and of keys, where the method has none of its own.
        compiler: backend of ``torch.compile``.
    """

    case: Case
    layers: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype
    block: int = 128
    compiler: str = "inductor"
    model: nn.Module = field(init=False)
    arguments: dict[str, Any] = field(init=False)
    _step: int = 0

    def __post_init__(self) -> None:
        """Build it."""
        self.model = build(self.case, self.layers, self.device, self.dtype)
        self.arguments = inputs(self.case, self.device, self.dtype)

    @property
    def attentions(self) -> int:
        """Self-attention calls of a step."""
        return sum(self.layers)

    def compile(self, *, whole: bool = True) -> None:
        """Compile the repeated blocks, ``whole`` as one graph each."""
        for name in ("blocks", "transformer_blocks", "single_transformer_blocks"):
            for block in getattr(self.model, name, []):
                block.compile(fullgraph=whole, backend=self.compiler, dynamic=False)

    def step(self) -> Tensor:
        """One forward call at the next step of a run."""
        self._step = self._step % (STEPS - 1) + 1
        value = 1000.0 * (1 - self._step / STEPS)
        if self.case.family == "flux":
            value /= 1000
        timestep = torch.full((self.case.batch,), value, device=self.device)
        context = self.model.cache_context("cond", step_index=self._step, num_inference_steps=STEPS)
        with torch.no_grad(), context:
            out: Tensor = self.model(timestep=timestep, return_dict=False, **self.arguments)[0]
        return out

    def restart(self) -> None:
        """The next step is the first of a run."""
        self._step = 0

    def enable(self, method: str, density: float, **more: Any) -> dit_accel.Handle:
        """Accelerate it; the first step plans."""
        self.restart()
        options = {**METHODS[method], "density": density}
        if method not in _OWN_BLOCKS:
            options |= {"block_q": self.block, "block_k": self.block}
        return dit_accel.enable(self.model, min_tokens=0, **{**options, **more})


@contextmanager
def cudnn_first(device: torch.device) -> Iterator[None]:
    """Dense attention is cuDNN's where it can be."""
    with ExitStack() as stack:
        if device.type == "cuda":
            order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
            stack.enter_context(sdpa_kernel(order, set_priority=True))
        yield


def timed(call: Callable[[], Any], device: torch.device, rounds: int) -> list[float]:
    """Milliseconds of each round."""
    found = []
    for _ in range(rounds):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize()
            found.append(begin.elapsed_time(end))
        else:
            start = time.perf_counter()
            call()
            found.append((time.perf_counter() - start) * 1e3)
    return found


@contextmanager
def peak(device: torch.device) -> Iterator[list[float]]:
    """Highest memory in GiB, in the list once the block is left."""
    found: list[float] = []
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    yield found
    found.append(torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0)


@dataclass
class Profile:
    """Where the time of one step went, by kernel: milliseconds and launches."""

    kernels: dict[str, tuple[float, int]]
    attention_ms: float
    total_ms: float

    def top(self, count: int = 16) -> list[list[Any]]:
        """The longest, as ``[name, ms, launches]``."""
        ranked = sorted(self.kernels.items(), key=lambda item: -item[1][0])
        return [[name[:140], round(ms, 3), calls] for name, (ms, calls) in ranked[:count]]


def profiled(call: Callable[[], Any], device: torch.device, attentions: int) -> Profile:
    """One step under the profiler; attention is the ``attentions`` longest of its kernels: cross-attention is short."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as found:
        call()
        if cuda:
            torch.cuda.synchronize()
    kernels: dict[str, list[float]] = defaultdict(list)
    for event in found.events() or []:
        if not cuda:
            kernels[event.name].append(event.self_cpu_time_total / 1e3)
        elif event.device_type == DeviceType.CUDA:
            kernels[event.name].append(event.time_range.elapsed_us() / 1e3)
    attention = sorted((ms for name, runs in kernels.items() if _ATTENTION.search(name) for ms in runs), reverse=True)
    return Profile(
        {name: (sum(runs), len(runs)) for name, runs in kernels.items()},
        sum(attention[:attentions]),
        sum(ms for runs in kernels.values() for ms in runs),
    )


def alone(subject: Subject) -> float:
    """Milliseconds of the self-attention of a step on its own, where no kernel of a known name was seen."""
    case = subject.case
    shape = (case.batch, case.heads, case.tokens, case.dim)
    q, k, v = (torch.randn(shape, device=subject.device, dtype=subject.dtype) for _ in range(3))
    with cudnn_first(subject.device):
        found = timed(lambda: F.scaled_dot_product_attention(q, k, v), subject.device, 3)
    return subject.attentions * statistics.median(found)


def relative(found: Tensor, want: Tensor) -> float:
    """Relative L2 distance."""
    return float((found.float() - want.float()).norm() / want.float().norm())


def warm(subject: Subject, density: float, methods: list[str]) -> dict[str, dict[str, float]]:
    """Compile everything, and the gate: with everything kept the output is that of dense attention.

    Returns:
        By method: relative errors of the first step's output, ``kept`` with everything kept and ``sparse`` at the density,
        and ``exact``, the density of exact blocks with which all the work of a step is the density.

    Raises:
        RuntimeError: if it is not.
    """
    found: dict[str, dict[str, float]] = {}
    with cudnn_first(subject.device):
        subject.restart()
        dense = subject.step()
        for method in methods:
            with subject.enable(method, 1.0) as handle:
                found[method] = {"kept": relative(subject.step(), dense), "exact": FIXED.get(method, density)}
                sparse = handle.stats()["transformer"].sparse_calls
            if sparse != (0 if method == "hooked" else subject.attentions):
                raise RuntimeError(
                    f"{subject.case.name}: {sparse} of {subject.attentions} calls of {method} were sparse"
                )
            if method in FIXED:
                continue
            with subject.enable(method, density) as handle:
                found[method]["sparse"] = relative(subject.step(), dense)
                subject.step()
                found[method]["exact"] = max(2 * density - _work(handle), density / 2)
    limit = 2e-2 if subject.dtype == torch.bfloat16 else 1e-4
    bad = {name: error["kept"] for name, error in found.items() if not error["kept"] <= limit}
    if bad:
        raise RuntimeError(f"{subject.case.name}: with everything kept the output is off by {bad}, limit {limit}")
    return found


def _work(handle: dit_accel.Handle) -> float:
    """Work of the latest step over that of dense attention."""
    by_step = handle.stats()["transformer"].density_by_step
    return by_step[max(by_step)]


def measure_case(subject: Subject, methods: list[str], gate: dict[str, dict[str, float]]) -> Iterator[dict[str, Any]]:
    """All numbers of one model, after :func:`warm`; a record after each method, the last one with all."""
    device = subject.device
    with cudnn_first(device):
        subject.restart()
        subject.step()
        with peak(device) as dense_peak:
            dense = timed(subject.step, device, _DENSE_ROUNDS)
        where = profiled(subject.step, device, subject.attentions)
        attention_ms = where.attention_ms or alone(subject)
        rows: dict[str, dict[str, Any]] = {}
        found = {
            "name": subject.case.name,
            "tokens": subject.case.tokens,
            "batch": subject.case.batch,
            "layers": list(subject.layers),
            "of_layers": list(subject.case.layers),
            "block": subject.block,
            "attention_ms": attention_ms,
            "attention_by": "kernels" if where.attention_ms else "attention alone",
            "dense_peak_gib": dense_peak[0],
            "dense_kernels": where.top(),
            "gate": gate,
            "methods": rows,
        }
        yield {**found, "complete": False, **_compared(rows, dense, attention_ms, dense_peak[0])}
        for method in methods:
            rows[method] = _sparse(subject, method, gate[method]["exact"])
            yield {**found, "complete": False, **_compared(rows, dense, attention_ms, dense_peak[0])}
        dense += timed(subject.step, device, 2)
    yield {**found, "complete": True, **_compared(rows, dense, attention_ms, dense_peak[0])}


def _compared(
    rows: dict[str, dict[str, Any]], dense: list[float], attention_ms: float, dense_peak: float
) -> dict[str, Any]:
    """What dense attention took; the rows are told how they compare."""
    dense_ms = statistics.median(dense)
    share = attention_ms / dense_ms
    for row in rows.values():
        ceiling = 1 / (1 - share + share * row["density"])
        row["speedup"] = dense_ms / row["step_ms"]
        row["ceiling"], row["of_ceiling"] = ceiling, row["speedup"] / ceiling
        row["peak_ratio"] = row["peak_gib"] / dense_peak if dense_peak else 1.0
    return {"dense_ms": dense_ms, "dense_all_ms": list(dense), "attention_share": share}


def _sparse(subject: Subject, method: str, density: float) -> dict[str, Any]:
    """One method: the planning step, then steps that use the plan."""
    device = subject.device
    with subject.enable(method, density) as handle:
        with peak(device) as plan_peak:
            planning = timed(subject.step, device, 1)[0]
        with peak(device) as sparse_peak:
            sparse = timed(subject.step, device, _SPARSE_ROUNDS)
        where = profiled(subject.step, device, subject.attentions)
        status = handle.stats()["transformer"]
        blocks = handle.runs["transformer"].method
    last = max(status.density_by_step)
    return {
        "step_ms": statistics.median(sparse),
        "all_ms": sparse,
        "planning_step_ms": planning,
        "density": status.density_by_step[last],
        "exact_density": status.sparse_density,
        "backend": status.backend,
        "blocks": f"{blocks.block_q}x{blocks.block_k}",
        "peak_gib": sparse_peak[0],
        "planning_peak_gib": plan_peak[0],
        "reasons": status.reasons,
        "kernels": where.top(),
        "kernels_ms": where.total_ms,
    }
