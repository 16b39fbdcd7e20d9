"""Watching dense runs: what each head would lose at several densities, with the plans that the method would have made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dit_accel.adapter import StepInfo
from dit_accel.context import PlanContext
from dit_accel.geometry import TokenGeometry
from dit_accel.policy import Action, Policy
from dit_accel.profiles.profile import ErrorCurve
from dit_accel.score import Scores
from dit_accel.targets.probe import DENSITIES, Probe

if TYPE_CHECKING:
    from dit_accel.planner import Planner
    from dit_accel.runtime import ModelRun

__all__ = ["Observer", "parts_of_run"]

_PARTS, _STEPS_OF_PART = 3, 3


def parts_of_run(policy: Policy, steps: int) -> tuple[tuple[float, ...], dict[int, int]]:
    """The parts of a run that may have densities of their own: each begins where a plan is made, three at most.

    Returns:
        Shares of the run at which they begin, the first 0; and which part each step to look at belongs to, the first, the
        middle and the last sparse step of each plan's life.

    Raises:
        ValueError: if no plan is made in a run of so many steps.
    """
    plans: list[tuple[int, list[int]]] = []
    planned_at: int | None = None
    for i in range(steps):
        action = policy.action(StepInfo(step=i, steps=steps), planned_at is not None, planned_at)
        if action in (Action.PLAN, Action.DENSE_AND_PLAN):
            plans, planned_at = [*plans, (i, [])], i
        if action in (Action.PLAN, Action.SPARSE) and plans:
            plans[-1][1].append(i)
    if not plans:
        raise ValueError(f"no attention is sparse in {steps} steps with this method; lower warmup or take more steps")
    count = min(len(plans), _PARTS)
    starts = [0.0] * count
    looked_at: dict[int, int] = {}
    for index in range(len(plans) - 1, -1, -1):
        part = index * count // len(plans)
        made, lives = plans[index]
        starts[part] = made / steps if part else 0.0
        number = min(_STEPS_OF_PART, len(lives))
        picked = {lives[round(i * (len(lives) - 1) / max(number - 1, 1))] for i in range(number)}
        looked_at.update(dict.fromkeys(picked, part))
    return tuple(starts), looked_at


class _Capture:
    """Stands in for a control while a plan is made, and takes sampled plans at all densities."""

    def __init__(self, densities: Sequence[float]) -> None:
        self.densities = densities
        self.probe: Probe | None = None
        self.chosen: list[str] = []

    def join(self, layers: tuple[str, ...]) -> None:
        """Every model will do."""

    def begin(self, geometry: TokenGeometry) -> list[str]:
        """Nothing depends on the geometry."""
        return []

    def head_orders(self, planner: Planner, geometry: TokenGeometry, layer: int, device: torch.device) -> None:
        """Heads choose."""

    def shares(self, planner: Planner, ctx: PlanContext, names: tuple[str, ...], scores: Scores) -> Tensor | None:
        """Take the plans; the method's own density stands."""
        self.probe = Probe.of(ctx, names, scores, self.densities)
        if ctx.order is not None:
            self.chosen = [names[i] for i in ctx.order.head.tolist()]
        return None


class Observer:
    """Sums of errors over calibration runs of one transformer. What it holds does not grow with the number of runs.

    Args:
        densities: rising, at which errors are measured.

    Attributes:
        starts: shares of the run at which its parts begin.
        geometry: of the runs, once seen.
        steps: denoising steps of the runs.
        error: by part and layer, float64 ``[D, H]``, summed relative squared errors.
        output: by part and layer, float64 ``[H]``, summed shares of the layer's squared output.
        seen: by part and layer, how many were summed.
        votes: by layer, how often each head chose each order, as ``{"head:order": count}``.
    """

    def __init__(self, densities: Sequence[float] = DENSITIES) -> None:
        self.densities = tuple(densities)
        self.starts: tuple[float, ...] = ()
        self.geometry: TokenGeometry | None = None
        self.steps = 0
        self.error: dict[tuple[int, int], Tensor] = {}
        self.output: dict[tuple[int, int], Tensor] = {}
        self.seen: Counter[tuple[int, int]] = Counter()
        self.votes: dict[int, Counter[str]] = {}
        self._probes: dict[tuple[int, str], tuple[Probe | None, int]] = {}
        self._looked_at: dict[int, int] = {}

    def observe(
        self,
        run: ModelRun,
        tensors: tuple[Tensor, Tensor, Tensor],
        out: Tensor,
        lse: Tensor,
        layer: int,
        step: StepInfo,
        geometry: TokenGeometry,
        scale: float | None,
        key_valid: Tensor | None,
    ) -> None:
        """Take in one attention call of a dense run; query, key, value and output are ``[B, H, S, D]`` in natural order.

        Raises:
            ValueError: if steps are not known, or the geometry is not that of the runs before.
        """
        if step.step is None or not step.steps:
            raise ValueError("calibration needs a pipeline that tells its steps, got none")
        self._check(run, geometry, step.steps)
        at = (layer, "" if run.method.branches == "shared" else step.branch)
        probe, planned_at = self._probes.get(at, (None, None))
        if planned_at is not None and step.step < planned_at:
            probe, planned_at = None, None  # the next prompt
        action = run.policy.action(step, planned_at is not None, planned_at)
        if action in (Action.PLAN, Action.DENSE_AND_PLAN):
            probe = self._plan(run, tensors, out, lse, layer, step, geometry, scale, key_valid)
            self._probes[at] = (probe, step.step)
        part = self._looked_at.get(step.step)
        if probe is not None and part is not None and action in (Action.PLAN, Action.SPARSE):
            found = probe.errors(*tensors, out, scale=scale, key_valid=key_valid, backend=None)
            self._add((part, layer), *found)

    def _check(self, run: ModelRun, geometry: TokenGeometry, steps: int) -> None:
        if self.geometry is None:
            self.geometry, self.steps = geometry, steps
        if (geometry, steps) != (self.geometry, self.steps):
            raise ValueError(
                f"calibration runs must share one geometry and number of steps: {self.geometry} in {self.steps}, "
                f"{geometry} in {steps}"
            )
        if not self._looked_at:
            self.starts, self._looked_at = parts_of_run(run.policy, steps)

    def _plan(
        self,
        run: ModelRun,
        tensors: tuple[Tensor, Tensor, Tensor],
        out: Tensor,
        lse: Tensor,
        layer: int,
        step: StepInfo,
        geometry: TokenGeometry,
        scale: float | None,
        key_valid: Tensor | None,
    ) -> Probe | None:
        q, k, v = tensors
        density = run.policy.density(step)
        ctx = run.planner.context(q, k, v, lse, geometry, density=density, scale=scale, key_valid=key_valid)
        capture = _Capture(self.densities)
        ctx.layer, ctx.step, ctx.dense_out, ctx.control = layer, step, out, capture
        run.planner.plan(ctx)
        votes = self.votes.setdefault(layer, Counter())
        votes.update(f"{head}:{name}" for head, name in enumerate(capture.chosen))
        return capture.probe

    def _add(self, at: tuple[int, int], error: Tensor, output: Tensor) -> None:
        tiny = torch.finfo(torch.float32).tiny
        relative = (error / output.clamp(min=tiny)).double().cpu()
        share = (output / output.sum().clamp(min=tiny)).double().cpu()
        if not bool(torch.isfinite(relative).all()):
            raise ValueError(
                f"attention of layer {at[1]} was not finite: NaN or infinity in its queries, keys or values"
            )
        self.error[at] = self.error.get(at, torch.zeros_like(relative)) + relative
        self.output[at] = self.output.get(at, torch.zeros_like(share)) + share
        self.seen[at] += 1

    def forget_run(self) -> None:
        """A run is over; its sampled plans are of no more use."""
        self._probes.clear()

    def curve(self, layers: int, *, by_head: bool) -> ErrorCurve:
        """Mean errors over all that was seen. Layers that were never sparse count as those that lose nothing.

        Raises:
            ValueError: if nothing was seen.
        """
        if not self.seen:
            raise ValueError("calibration saw no attention that could be sparse")
        heads = next(iter(self.output.values())).shape[0]
        shape = (len(self.starts), layers, heads)
        error, output = torch.zeros(len(self.densities), *shape), torch.full(shape, 1e-6)
        for (part, layer), count in self.seen.items():
            error[:, part, layer] = (self.error[part, layer] / count).float()
            output[part, layer] = (self.output[part, layer] / count).float()
        return ErrorCurve(self.densities, error, output, by_head)

    def orders(self, layers: int) -> tuple[tuple[str, ...], ...]:
        """The order that each head chose most often; empty where there was no choice or not all layers made one."""
        if len(self.votes) < layers or not all(self.votes.values()):
            return ()
        heads = next(iter(self.output.values())).shape[0]
        found = []
        for layer in range(layers):
            rows: list[Counter[str]] = [Counter() for _ in range(heads)]
            for key, count in self.votes[layer].items():
                head, _, name = key.partition(":")
                rows[int(head)][name] += count
            found.append(tuple(row.most_common(1)[0][0] for row in rows))
        return tuple(found)

    def state(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """Everything that is summed, as tensors and plain JSON types; :meth:`restore` takes it back."""
        tensors = {f"error.{p}.{layer}": x for (p, layer), x in self.error.items()}
        tensors |= {f"output.{p}.{layer}": x for (p, layer), x in self.output.items()}
        geometry = self.geometry
        return tensors, {
            "densities": list(self.densities),
            "starts": list(self.starts),
            "steps": self.steps,
            "geometry": None
            if geometry is None
            else [geometry.grid and list(geometry.grid), geometry.prefix, geometry.suffix, geometry.visual],
            "seen": {f"{p}.{layer}": count for (p, layer), count in self.seen.items()},
            "votes": {str(layer): dict(votes) for layer, votes in self.votes.items()},
        }

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Observer:
        """Rebuild from :meth:`state`."""
        made = cls(meta["densities"])
        made.starts, made.steps = tuple(meta["starts"]), meta["steps"]
        if meta["geometry"] is not None:
            grid, prefix, suffix, visual = meta["geometry"]
            made.geometry = TokenGeometry(grid and tuple(grid), prefix, suffix, visual)
        for name, tensor in tensors.items():
            kind, part, layer = name.split(".")
            (made.error if kind == "error" else made.output)[int(part), int(layer)] = tensor
        for key, count in meta["seen"].items():
            part, layer = key.split(".")
            made.seen[int(part), int(layer)] = count
        made.votes = {int(layer): Counter(votes) for layer, votes in meta["votes"].items()}
        return made
