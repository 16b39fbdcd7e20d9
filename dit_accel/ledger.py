"""What was computed, counted: decisions, density, plan time."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dit_accel.logging import get_logger, warn_once

__all__ = ["SCHEDULED", "LayerStatus", "Ledger", "RunStatus", "Status"]

_logger = get_logger(__name__)

#: Reasons for dense calls that the user's own settings give; the others are worth a warning.
SCHEDULED = ("warm-up", "planning step", "end", "dense turn", "dense layer", "calibration", "method 'dense'")


@dataclass
class LayerStatus:
    """What one layer did over a run.

    Attributes:
        name: module path.
        sparse: sparse calls.
        dense: dense calls by reason.
        density: work over dense work, all calls, planning and pooled keys included.
        head_density: exact share by head, mean over sparse calls.
        orders: token order of each head, where the heads chose.
        precision: number formats of sparse calls.
        wide_heads: heads that stayed in 16 bit where ``precision`` is narrower; of any guidance branch.
    """

    name: str
    sparse: int = 0
    dense: dict[str, int] = field(default_factory=dict)
    density: float = 1.0
    head_density: list[float] = field(default_factory=list)
    orders: list[str] = field(default_factory=list)
    precision: str = "bf16"
    wide_heads: list[int] = field(default_factory=list)


@dataclass
class RunStatus:
    """What an accelerated transformer did over its latest run.

    Attributes:
        model: transformer class name.
        method: method name.
        backend: kernel backend of the sparse calls.
        geometry: token geometry as text.
        density: work over dense work of the whole run: warm-up, planning and pooled keys included.
        sparse_density: exact share on sparse calls.
        calls: attention calls seen.
        sparse_calls: of them sparse.
        plan_ms: time spent planning, milliseconds.
        plan_work: work of planning over the work of a dense run.
        plans: plans made.
        cache_hits: sparse calls that used a plan made earlier.
        density_by_step: work over dense work by step.
        reasons: dense calls by reason.
        layers: per layer.
        notes: things worth knowing, such as scores that were not finite.
    """

    model: str
    method: str
    backend: str = ""
    geometry: str = ""
    density: float = 1.0
    sparse_density: float = 1.0
    calls: int = 0
    sparse_calls: int = 0
    plan_ms: float = 0.0
    plan_work: float = 0.0
    plans: int = 0
    cache_hits: int = 0
    density_by_step: dict[int, float] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    layers: list[LayerStatus] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        """What was computed and what stayed dense, in a few lines."""
        if not self.calls:
            return f"{self.model}: {self.method}, no run yet"
        at = f" at {self.sparse_density:.3f}" if self.sparse_calls else ""
        lines = [
            f"{self.model}: {self.method} on {self.backend or 'no backend'}, {self.geometry or 'unknown geometry'}",
            f"  density {self.density:.3f} over the run ({self.sparse_calls} of {self.calls} calls sparse{at}), "
            f"{self.plans} plans in {self.plan_ms:.1f} ms, {self.cache_hits} calls used an earlier one",
        ]
        narrow = sorted({layer.precision for layer in self.layers} - {"bf16"})
        if narrow:
            wide = sum(len(layer.wide_heads) for layer in self.layers)
            lines.append(f"  precision {', '.join(narrow)}" + (f", {wide} heads in 16 bit" if wide else ""))
        lines += [f"  dense: {count} x {reason}" for reason, count in self.reasons.items()]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


class Status(dict[str, RunStatus]):
    """:class:`RunStatus` by component name; prints itself."""

    def __str__(self) -> str:
        """One paragraph for each transformer."""
        if not self:
            return "nothing is accelerated"
        return "\n".join(f"{name}: {status}" for name, status in self.items())


class _Timer:
    """Wall time on the CPU, events on CUDA that are read only when asked for."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def measure(self, device: torch.device) -> Iterator[None]:
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
            return
        start = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - start

    def milliseconds(self) -> float:
        if self._events:
            torch.cuda.synchronize()
            self._seconds += sum(b.elapsed_time(e) for b, e in self._events) / 1e3
            self._events.clear()
        return self._seconds * 1e3


class _Call(NamedTuple):
    """One attention call: exact share (``[B|1, H|1]`` on the device) and further work."""

    step: int | None
    layer: int
    exact: Tensor | float
    extra: Tensor | float


class _Planned(NamedTuple):
    """One plan, its cost in dense attentions of the layer."""

    step: int | None
    layer: int
    cost: float


class Ledger:
    """Counts the calls of one run without touching the device; :meth:`status` reads it all."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []
        self.plans: list[_Planned] = []
        self.dense: dict[int, Counter[str]] = defaultdict(Counter)
        self.flags: list[tuple[str, Tensor]] = []
        self.orders: dict[int, tuple[tuple[str, ...], Tensor]] = {}
        self.precisions: dict[int, tuple[str, frozenset[int]]] = {}
        self.cache_hits = 0
        self.timer = _Timer()
        self.backend = ""
        self.geometry = ""

    def count_dense(self, step: int | None, layer: int, reason: str) -> None:
        """One dense call."""
        self.dense[layer][reason] += 1
        self.calls.append(_Call(step, layer, 1.0, 0.0))

    def count_sparse(self, step: int | None, layer: int, exact: Tensor, extra: Tensor | float, *, reused: bool) -> None:
        """One sparse call: ``exact`` share ``[B|1, H|1]``, plus ``extra`` work."""
        self.calls.append(_Call(step, layer, exact, extra))
        self.cache_hits += reused

    def count_plan(self, step: int | None, layer: int, cost: float) -> None:
        """One plan, ``cost`` in dense attentions of the layer."""
        self.plans.append(_Planned(step, layer, cost))

    def note_precision(self, layer: int, name: str, wide: Iterable[int] = ()) -> None:
        """The number formats of a layer's sparse calls, and the heads that stay in 16 bit."""
        known = self.precisions.get(layer, ("", frozenset[int]()))[1]
        self.precisions[layer] = (name, known.union(wide))

    def warn_if_all_dense(self, model: str, meant: bool) -> None:
        """Say once, at the end of a run, that nothing was sparse although nobody asked for that."""
        if meant or not self.calls or any(isinstance(call.exact, Tensor) for call in self.calls):
            return
        reasons = dict.fromkeys(reason for counted in self.dense.values() for reason in counted)
        if any(reason not in SCHEDULED for reason in reasons):
            return  # that was said when it happened
        told = ", ".join(reasons)
        warn_once(_logger, (model, "all dense", told), f"no attention of {model} was sparse in this run: {told}")

    def flag(self, text: str, ok: Tensor) -> None:
        """Remember a device-side check; ``text`` becomes a note if it turns out false."""
        self.flags.append((text, ok))

    def status(self, model: str, method: str, layers: tuple[str, ...]) -> RunStatus:
        """Read everything, once per question; this is where the device is waited for."""
        shares = self._read_shares()
        extras = self._read_extras()
        works = [share.mean().item() + extra for share, extra in zip(shares, extras, strict=True)]
        plan_work = sum(p.cost for p in self.plans)
        sparse = [i for i, c in enumerate(self.calls) if isinstance(c.exact, Tensor)]
        count = len(works)
        status = RunStatus(model, method, self.backend, self.geometry)
        status.calls, status.sparse_calls = count, len(sparse)
        status.plans, status.cache_hits = len(self.plans), self.cache_hits
        status.plan_ms = self.timer.milliseconds()
        if count:
            status.density = (sum(works) + plan_work) / count
            status.plan_work = plan_work / count
        if sparse:
            status.sparse_density = sum(shares[i].mean().item() for i in sparse) / len(sparse)
        status.density_by_step = self._by("step", works)
        by_layer = self._by("layer", works)
        status.layers = [
            self._layer(i, name, by_layer.get(i, 1.0), [shares[j] for j in sparse if self.calls[j].layer == i])
            for i, name in enumerate(layers)
        ]
        reasons: Counter[str] = Counter()
        for counted in self.dense.values():
            reasons.update(counted)
        status.reasons = dict(reasons)
        status.notes = list(dict.fromkeys(text for text, ok in self.flags if not bool(ok)))
        return status

    def _read_shares(self) -> list[Tensor]:
        """Exact share of each call on the host, float32 ``[H]``; plans repeat, so each is read once."""
        read: dict[int, Tensor] = {}
        shares = []
        for call in self.calls:
            if not isinstance(call.exact, Tensor):
                shares.append(torch.tensor([call.exact]))
                continue
            if id(call.exact) not in read:
                read[id(call.exact)] = call.exact.detach().float().mean(0).cpu()
            shares.append(read[id(call.exact)])
        return shares

    def _read_extras(self) -> list[float]:
        """Further work of each call on the host."""
        read: dict[int, float] = {}
        extras = []
        for call in self.calls:
            if not isinstance(call.extra, Tensor):
                extras.append(call.extra)
                continue
            if id(call.extra) not in read:
                read[id(call.extra)] = float(call.extra.detach().float().mean())
            extras.append(read[id(call.extra)])
        return extras

    def _by(self, key: str, works: list[float]) -> dict[int, float]:
        """Mean work per attention call, planning included, by step or layer."""
        total: dict[int, float] = defaultdict(float)
        count: Counter[int] = Counter()
        for call, work in zip(self.calls, works, strict=True):
            place = getattr(call, key)
            if place is not None:
                total[place] += work
                count[place] += 1
        for plan in self.plans:
            if getattr(plan, key) in total:
                total[getattr(plan, key)] += plan.cost
        return {place: total[place] / count[place] for place in sorted(total)}

    def _layer(self, index: int, name: str, density: float, shares: list[Tensor]) -> LayerStatus:
        entry = LayerStatus(name, len(shares), dict(self.dense.get(index, {})), density)
        if shares:
            entry.head_density = torch.stack(shares).mean(0).tolist()
        if index in self.orders:
            names, choice = self.orders[index]
            entry.orders = [names[i] for i in choice.tolist()]
        if index in self.precisions:
            entry.precision, wide = self.precisions[index]
            entry.wide_heads = sorted(wide)
        return entry
