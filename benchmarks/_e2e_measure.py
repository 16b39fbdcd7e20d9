"""What is measured of one model: a gate, then dense and sparse steps, method by method."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from _e2e_run import (
    FIXED,
    LATE,
    Profile,
    Subject,
    alone,
    cudnn_first,
    held,
    host_time,
    peak,
    profiled,
    relative,
    settle,
    timed,
)
from _e2e_workers import mark
from torch import Tensor

import dit_accel
from dit_accel.compensate.residual import RESIDUAL_BYTES

__all__ = ["Measurement"]

_ROUNDS = (3, 15)  # steps that are timed, at least and at most
_ROUNDS_MS = 600.0  # and how long they may take together
_SHORT_MS, _TURNS = 50.0, 8  # dense steps that are timed in turns with sparse ones, and how often
_FEW_MS = 1500.0  # as long may those of a whole model take beyond the first


class Measurement:
    """All numbers of one model.

    Args:
        subject: the model, compiled.
        density: work of a sparse step over that of dense attention.
        brief: as few steps as can be, for models with all their blocks: no gate, no profile, the density as the method
            understands it, the share of attention by attention alone.
    """

    def __init__(self, subject: Subject, density: float, *, brief: bool = False) -> None:
        self.subject, self.density, self.brief = subject, density, brief
        self._gate: dict[str, dict[str, float]] = {}
        self._rows: dict[str, dict[str, Any]] = {}
        self._dense: list[float] = []
        self._first: Tensor | None = None
        self._fixed: dict[str, Any] = {}
        self._again = 1

    def gate(self, methods: list[str]) -> None:
        """Compile what methods need; with everything kept the output must be that of dense attention.

        Raises:
            RuntimeError: if it is not.
        """
        subject = self.subject
        with cudnn_first(subject.device):
            if self.brief:
                self._warm_up(methods)
                return
            if self._first is None:
                subject.register()
                subject.restart()
                self._first = subject.step()
                mark(f"{subject.case.name}: dense compiled")
            for method in methods:
                self._gate[method] = self._passed(method, self._first)
                mark(f"{subject.case.name}: {method} is ready")

    def _warm_up(self, methods: list[str]) -> None:
        """Compile with one block of each list, since steps of the whole model take long."""
        subject = self.subject
        with subject.shortened():
            subject.register()
            subject.restart()
            subject.step()
            mark(f"{subject.case.name}: dense compiled")
            for method in methods:
                self._gate[method] = {"exact": FIXED.get(method, self.density)}
                with subject.enable(method, self._gate[method]["exact"]):
                    subject.step()
                    subject.step()
                mark(f"{subject.case.name}: {method} is ready")

    def _passed(self, method: str, dense: Tensor) -> dict[str, float]:
        """Relative errors of the first sparse step's output, and the exact density that makes all work the density."""
        subject, late = self.subject, int(method in LATE)
        if late:
            subject.restart()
            subject.step()
            dense = subject.step()
        with subject.enable(method, 1.0) as handle:
            error = relative([subject.step() for _ in range(late + 1)][-1], dense)
            sparse = handle.stats()["transformer"].sparse_calls
        if sparse != (0 if method == "hooked" else subject.attentions):
            raise RuntimeError(f"{subject.case.name}: {sparse} of {subject.attentions} calls of {method} were sparse")
        limit = 2e-2 if subject.dtype == torch.bfloat16 or method == "kept8" else 1e-4
        if not error <= limit:
            raise RuntimeError(
                f"{subject.case.name}: with everything kept {method} is off by {error}, the limit is {limit}"
            )
        if method in FIXED:
            return {"kept": error, "exact": FIXED[method]}
        with subject.enable(method, self.density) as handle:
            found = relative([subject.step() for _ in range(late + 1)][-1], dense)
            subject.step()
            exact = max(2 * self.density - _work(handle), self.density / 2)
        return {"kept": error, "sparse": found, "exact": exact}

    def measure(self, methods: list[str]) -> Iterator[dict[str, Any]]:
        """Time dense steps and those of methods that have passed the gate; all that is known, after each method."""
        subject = self.subject
        with cudnn_first(subject.device):
            subject.restart()
            if not self.brief:
                settle(subject)
            if self._fixed:
                self._dense += timed(subject.step, subject.device, self._again)
            else:
                self._measure_dense()
            yield self.record()
            for method in methods:
                self._rows[method] = self._sparse(method)
                if not self.brief and self._dense[0] < _SHORT_MS:
                    self._rows[method]["in_turns"] = self._in_turns(method)
                if not self.brief:
                    self._dense += timed(subject.step, subject.device, self._again)
                yield self.record()

    def _measure_dense(self) -> None:
        subject = self.subject
        with peak(subject.device) as highest:
            if self.brief:
                self._dense += timed(self._keep_first, subject.device, 1)
                self._dense += _few(subject.step, subject.device, self._dense[0])
            else:
                self._dense += _enough(subject.step, subject.device)
        self._again = max(1, len(self._dense) // 3)
        host = 0.0 if self.brief else host_time(subject.step, subject.device)
        where = self._profile()
        self._fixed = {
            "name": subject.case.name,
            "tokens": subject.case.tokens,
            "batch": subject.case.batch,
            "layers": list(subject.layers),
            "of_layers": list(subject.case.layers),
            "block": subject.block,
            "attention_ms": where.attention_ms or alone(subject),
            "attention_by": "kernels" if where.attention_ms else "attention alone",
            "dense_peak_gib": highest[0],
            "missing_weights_gib": subject.missing()[0],
            "dense_kernels": where.top(),
            "dense_kernels_ms": where.total_ms,
            "dense_host_ms": host,
        }

    def _keep_first(self) -> None:
        self._first = self.subject.step()

    def _profile(self) -> Profile:
        """Where the time of a step goes."""
        if self.brief:
            return Profile({}, 0.0, 0.0)
        return profiled(self.subject.step, self.subject.device, self.subject.attentions)

    def record(self) -> dict[str, Any]:
        """All that is known."""
        fixed, dense_ms = self._fixed, statistics.median(self._dense)
        share, missing = fixed["attention_ms"] / dense_ms, fixed["missing_weights_gib"]
        rows = {
            name: _compared(row, dense_ms, share, fixed["dense_peak_gib"], missing) for name, row in self._rows.items()
        }
        times = {"dense_ms": dense_ms, "dense_all_ms": self._dense, "attention_share": share}
        return {**fixed, **times, "gate": self._gate, "methods": rows}

    def _in_turns(self, method: str) -> list[list[float]]:
        """Milliseconds of some sparse steps and of some dense ones, in turns: the clock of the GPU changes between runs."""
        subject, device, found = self.subject, self.subject.device, []
        for _ in range(_TURNS):
            with subject.enable(method, self._gate[method]["exact"]):
                timed(subject.step, device, 3)  # the first plans, and the third is the first that only repeats
                sparse = statistics.median(timed(subject.step, device, 5))
            timed(subject.step, device, 1)
            found.append([sparse, statistics.median(timed(subject.step, device, 5))])
        return found

    def _sparse(self, method: str) -> dict[str, Any]:
        """One method: the planning step, then steps that use the plan."""
        subject, device = self.subject, self.subject.device
        first: list[Tensor] = []
        with subject.enable(method, self._gate[method]["exact"]) as handle:
            before = held(device)
            with peak(device) as plan_peak:
                planning = timed(lambda: first.append(subject.step()), device, 1)[0]
            if self.brief and self._first is not None:
                self._gate[method]["sparse"] = relative(first[0], self._first)
            first.clear()
            kept = held(device) - before
            plans = _without_lists(handle, lambda: held(device) - before)
            missing = _missing_plans(subject, handle, kept, plans)
            with peak(device) as sparse_peak:
                if not self.brief:
                    timed(subject.step, device, 1)  # which derives the lists again
                sparse = timed(subject.step, device, 1) if self.brief else _enough(subject.step, device)
                if self.brief:
                    sparse += _few(subject.step, device, sparse[0])
            host = 0.0 if self.brief else host_time(subject.step, device)
            where = self._profile()
            status = handle.stats()["transformer"]
            blocks = handle.runs["transformer"].method
        return {
            "step_ms": statistics.median(sparse),
            "all_ms": sparse,
            "planning_step_ms": planning,
            "density": status.density_by_step[max(status.density_by_step)],
            "exact_density": status.sparse_density,
            "backend": status.backend,
            "blocks": f"{blocks.block_q}x{blocks.block_k}",
            "peak_gib": sparse_peak[0],
            "planning_peak_gib": plan_peak[0],
            "plans_gib": kept,
            "missing_plans_gib": missing,
            "reasons": status.reasons,
            "kernels": where.top(),
            "kernels_ms": where.total_ms,
            "host_ms": host,
        }


def _enough(step: Callable[[], Any], device: torch.device) -> list[float]:
    """Milliseconds of steps after one that says how many: short ones scatter, long ones take time."""
    first = timed(step, device, 1)[0]
    return timed(step, device, max(_ROUNDS[0], min(_ROUNDS[1], round(_ROUNDS_MS / first))))


def _few(step: Callable[[], Any], device: torch.device, first: float) -> list[float]:
    """Milliseconds of one or two steps more, where the ``first`` was short."""
    rounds = min(2, int(_FEW_MS // first))
    return timed(step, device, rounds) if rounds else []


def _without_lists(handle: dit_accel.Handle, measure: Callable[[], float]) -> float:
    """What a measurement finds once index lists are dropped, which are derived again when needed."""
    for state in handle.runs["transformer"]._states.values():
        for leaf in () if state.plan is None else state.plan.leaves:
            leaf.mask.drop_lists()
    return measure()


def _missing_plans(subject: Subject, handle: dit_accel.Handle, kept: float, plans: float) -> float:
    """GiB that the plans of the blocks that were left out would keep; lists and residuals of all layers are bounded.

    Args:
        subject: the model.
        handle: of the method, enabled.
        kept: by the plans at hand, GiB.
        plans: of it without index lists.
    """
    run, more = handle.runs["transformer"], subject.missing()[1] / subject.attentions
    found = [state.plan.state for state in run._states.values() if state.plan is not None]
    residuals = sum(tensor.nbytes for tensor in found if isinstance(tensor, Tensor)) / 2**30
    lists, missing = kept - plans, (plans - residuals) * more
    for have, most in ((lists, run._lists.limit), (residuals, RESIDUAL_BYTES)):
        missing += max(0.0, min(have * more, most / 2**30 - have))
    return missing


def _work(handle: dit_accel.Handle) -> float:
    """Work of the latest step over that of dense attention."""
    by_step = handle.stats()["transformer"].density_by_step
    return by_step[max(by_step)]


def _compared(row: dict[str, Any], dense_ms: float, share: float, dense_peak: float, missing: float) -> dict[str, Any]:
    """A row with how it compares with dense steps.

    Args:
        row: a method.
        dense_ms: of a dense step.
        share: of attention in it.
        dense_peak: its highest memory in GiB.
        missing: weights of the blocks that were left out, GiB.
    """
    ceiling, speedup = 1 / (1 - share + share * row["density"]), dense_ms / row["step_ms"]
    found = {"speedup": speedup, "ceiling": ceiling, "of_ceiling": speedup / ceiling}
    if "in_turns" in row:
        found["of_dense_in_turns"] = statistics.median(sparse / dense for sparse, dense in row["in_turns"])
    # With all blocks: their weights in both, and in ours what is kept of their plans.
    whole, most = dense_peak + missing, max(row["peak_gib"], row["planning_peak_gib"])
    more = missing + row["missing_plans_gib"]
    found["peak_ratio"] = row["peak_gib"] / dense_peak if dense_peak else 1.0
    found["whole_peak_ratio"] = (row["peak_gib"] + more) / whole if whole else 1.0
    found["whole_planning_peak_ratio"] = (most + more) / whole if whole else 1.0
    return {**row, **found}
