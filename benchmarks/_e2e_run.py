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
from dit_accel.asked import choose

__all__ = [
    "FIXED",
    "LATE",
    "METHODS",
    "PLANS",
    "Profile",
    "Subject",
    "alone",
    "cudnn_first",
    "held",
    "host_time",
    "peak",
    "profiled",
    "relative",
    "settle",
    "timed",
]

_KEPT: dict[str, Any] = {
    "method": None,
    "order": "axes",
    "order_choice": "spread",
    "score": "spread",
    "select": "top_k_head",
    "compensate": "mean",
    "warmup": 0.0,
}
#: Compared methods. Each head keeps as many blocks as any other, so the work is the density whatever the maps. "plain" is
#: the kernel alone, in the order of the tokens. "kept" and "hooked" say what we cost: everything kept, with tokens put in
#: order and a pooled remainder, also in 8 bits, and our hook around dense attention.
METHODS: dict[str, dict[str, Any]] = {
    # With the form for videos everywhere: the one for pictures shares its work between sparse steps and dense ones.
    "auto": {"method": "auto", "refresh": (), "warmup": 0.0, "pictures": ()},
    # On pictures their own form, in the steps between dense ones: the first is dense, and keeps what sparse ones lack.
    "pictures": {"method": "auto", "refresh": (), "warmup": 0.0, "dense_share": 0.0},
    "plain": {"method": None, "score": "spread", "select": "top_k_head", "warmup": 0.0},
    "union": {"method": "union", "warmup": 0.0},
    "kept": _KEPT,
    "kept8": {**_KEPT, "precision": "int8_fp8"},
    "hooked": {"method": "auto", "warmup": 1.0},
}
#: Methods whose density is not the one asked for.
FIXED = {"kept": 1.0, "kept8": 1.0, "hooked": 1.0}
#: Methods whose first step is dense.
LATE = ("pictures",)
_OWN_BLOCKS = ("auto", "pictures", "hooked")
PLANS = (
    "random weights give flat maps; every head keeps the same number of blocks (top_k_head, top_k), so the work is the "
    "density whatever the maps are; the plan is made at one step from that step's queries and keys, by the method's own "
    "scores, and used in those that are timed, without a refresh; the exact share is such that exact blocks and remainder "
    "together are the density"
)
STEPS = 50
_LISTS = ("blocks", "transformer_blocks", "single_transformer_blocks")
_ATTENTION = re.compile(r"sdpa|flash_fprop|fmha|flash_fwd|_scaled_dot_product_flash_attention_for_cpu")


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

    def missing(self) -> tuple[float, int]:
        """Weights in GiB of the blocks that were left out, and their number."""
        gib, count = 0.0, 0
        lists = [getattr(self.model, name) for name in _LISTS if hasattr(self.model, name)]
        for blocks, most in zip(lists, self.case.layers, strict=True):
            each = sum(p.numel() * p.element_size() for p in blocks[0].parameters()) / 2**30
            gib, count = gib + each * (most - len(blocks)), count + most - len(blocks)
        return gib, count

    def compile(self, *, whole: bool = True) -> None:
        """Compile the repeated blocks, ``whole`` as one graph each."""
        for name in _LISTS:
            for block in getattr(self.model, name, []):
                block.compile(fullgraph=whole, backend=self.compiler, dynamic=False)

    def register(self) -> None:
        """Have our backend known to diffusers: compiled blocks look at how many there are, and would compile again."""
        with self.enable("plain", 1.0):
            pass

    @contextmanager
    def shortened(self) -> Iterator[None]:
        """One block of each list for a while."""
        whole = {name: getattr(self.model, name) for name in _LISTS if hasattr(self.model, name)}
        try:
            for name, blocks in whole.items():
                setattr(self.model, name, nn.ModuleList(blocks[:1]))
            yield
        finally:
            for name, blocks in whole.items():
                setattr(self.model, name, blocks)

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

    def _options(self, method: str, density: float) -> dict[str, Any]:
        options = {**METHODS[method], "density": density}
        return options if method in _OWN_BLOCKS else {**options, "block_q": self.block, "block_k": self.block}

    def method(self, name: str, density: float) -> dit_accel.Method:
        """One of :data:`METHODS` at a density."""
        options = self._options(name, density)
        return choose(options.pop("method"), options)

    def enable(self, method: str, density: float) -> dit_accel.Handle:
        """Accelerate it; the first step plans."""
        self.restart()
        return dit_accel.enable(self.model, min_tokens=0, **self._options(method, density))


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


def host_time(call: Callable[[], Any], device: torch.device, rounds: int = 5) -> float:
    """Milliseconds after which the host is done with a call whose work the device has begun only then."""
    found = []
    for _ in range(rounds):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        found.append((time.perf_counter() - start) * 1e3)
    return statistics.median(found)


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


def settle(subject: Subject, most: int = 12) -> None:
    """Steps until two take as long: what other processes had launched before they were stopped is then done."""
    before = 0.0
    for _ in range(most):
        now = timed(subject.step, subject.device, 1)[0]
        if abs(now - before) < 0.05 * now:
            return
        before = now


def held(device: torch.device) -> float:
    """Memory in use, GiB."""
    return torch.cuda.memory_allocated() / 2**30 if device.type == "cuda" else 0.0


def relative(found: Tensor, want: Tensor) -> float:
    """Relative L2 distance."""
    return float((found.float() - want.float()).norm() / want.float().norm())
