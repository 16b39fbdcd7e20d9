"""Calibration: dense runs that tell what each head loses at each density, then accelerated ones that tell the PSNR."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dit_accel.api import _install, enabled
from dit_accel.calibration.folder import WorkFolder
from dit_accel.calibration.observe import Observer
from dit_accel.calibration.quality import pictures, psnr
from dit_accel.env import gpus, versions
from dit_accel.method import Method
from dit_accel.profiles import ANY_BRANCH, ComponentProfile, Profile, fingerprint
from dit_accel.profiles.retarget import densities_for, expected_error
from dit_accel.registry import find_adapter
from dit_accel.runtime import ModelRun
from dit_accel.targets.by_head import chooses_by_head
from dit_accel.targets.named import Target, stock_curve
from dit_accel.targets.probe import why_not_probed
from dit_accel.targets.quality import QualityCurve, QualityPoint

__all__ = ["Calibration", "Progress", "ProgressFn", "made_on"]

_MOST_TRIES = 3
_CLOSE_DB = 0.5


class Progress(NamedTuple):
    """How far a calibration is.

    Attributes:
        done: runs of the pipeline that are done.
        total: how many there will be, as far as is known.
        what: what comes next.
    """

    done: int
    total: int
    what: str


ProgressFn = Callable[[Progress], None]


@dataclass
class Calibration:
    """One calibration of all transformers of a pipeline.

    Args:
        pipe: a diffusers pipeline.
        modules: its transformers, by component name.
        prompts: what to run.
        method: which is to be used afterwards.
        target: what it is to reach.
        control: ``"density"``: each head gets a density; ``"error"``: an error is kept while it runs.
        errors: further errors whose PSNR is measured, so that the profile knows a longer curve.
        fix_orders: whether heads keep the order that they chose most often.
        seed: of the first prompt's noise; those of the others follow.
        folder: where it keeps what is done, to go on there; left out, nothing is kept.
        progress: called before each run and at the end.
        call: further arguments of the pipeline call.
    """

    pipe: Any
    modules: Mapping[str, nn.Module]
    prompts: Sequence[str]
    method: Method
    target: Target
    control: str = "density"
    errors: Sequence[float] = ()
    fix_orders: bool = True
    seed: int = 0
    folder: str | Path | None = None
    progress: ProgressFn | None = None
    call: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what cannot be calibrated."""
        reason = why_not_probed(self.method)
        if reason is not None:
            raise ValueError(f"method {self.method.name!r} cannot be calibrated to {self.target}: {reason}")
        if self.control not in ("density", "error"):
            raise ValueError(f"control must be 'density' or 'error', got {self.control!r}")
        if self.control == "error" and self.target.kind == "density":
            raise ValueError(
                "control='error' keeps an error, so that the target must be a PSNR or an error, not a density"
            )
        own = sorted({"generator", "prompt"} & set(self.call))
        if own:
            raise ValueError(f"{', '.join(own)} cannot be given: prompts= and seed= say what is run")
        bad = [error for error in self.errors if not 0 < error < 1]
        if bad:
            raise ValueError(f"errors must be above 0 and below 1, got {bad}")
        self._done = self._total = 0

    def run(self) -> Profile:
        """Calibrate.

        Raises:
            ValueError: if no attention could be watched, or the folder holds another calibration.
        """
        held = nullcontext(str(self.folder)) if self.folder is not None else tempfile.TemporaryDirectory()
        with held as path:
            folder = WorkFolder(path, self._settings())
            tries = _MOST_TRIES if self.target.kind == "psnr" else 1
            self._done, self._total = 0, len(self.prompts) * (1 + len(self.errors) + tries)
            profile = self._profile(self._dense_runs(folder))
            points = [self._point(folder, profile, error) for error in self.errors]
            found = self._aimed(folder, profile, points)
        self._total = self._done
        self._tell("done")
        return found

    def _settings(self) -> dict[str, Any]:
        return {
            "version": 1,
            "method": self.method.to_dict(),
            "prompts": list(self.prompts),
            "seed": self.seed,
            "fix_orders": self.fix_orders,
            "call": {key: repr(value) for key, value in sorted(self.call.items())},
            "models": {name: [type(m).__name__, fingerprint(m).to_dict()] for name, m in self.modules.items()},
        }

    def _tell(self, what: str) -> None:
        if self.progress is not None:
            self.progress(Progress(self._done, max(self._total, self._done), what))

    def _generate(self, index: int) -> Tensor:
        options = {"output_type": "np", **self.call}
        # On the CPU, so that a seed means the same noise on every device.
        generator = torch.Generator("cpu").manual_seed(self.seed + index)
        return pictures(self.pipe(prompt=self.prompts[index], generator=generator, **options))

    def _dense_runs(self, folder: WorkFolder) -> dict[str, Observer]:
        """Watch a dense run of each prompt, and keep what it makes."""
        observers = {name: Observer() for name in self.modules}
        first = 0
        for index in range(len(self.prompts)):
            kept = {name: folder.tensors(f"errors-{name}-{index}") for name in self.modules}
            if folder.tensors(f"dense-{index}") is None or any(found is None for found in kept.values()):
                break
            observers = {name: Observer.restore(*found) for name, found in kept.items() if found is not None}
            first, self._done = index + 1, self._done + 1
        for index in range(first, len(self.prompts)):
            self._tell(f"prompt {index + 1} dense")
            folder.put_tensors(f"dense-{index}", {"pictures": self._watched(index, observers)}, {})
            for name, observer in observers.items():
                observer.forget_run()
                folder.put_tensors(f"errors-{name}-{index}", *observer.state())
            self._done += 1
        return observers

    def _watched(self, index: int, observers: Mapping[str, Observer]) -> Tensor:
        runs = self._runs()
        for name, run in runs.items():
            run.observer = observers[name]
        with _install(self.pipe, self.method, dict(self.modules), runs):
            made = self._generate(index)
        for name, run in runs.items():
            if not observers[name].seen:
                raise ValueError(f"calibration saw no attention of {name} that could be sparse: {run.status().reasons}")
        return made

    def _runs(self) -> dict[str, ModelRun]:
        return {
            name: ModelRun(self.method, model=type(module).__name__, min_tokens=0, module=module)
            for name, module in self.modules.items()
        }

    def _profile(self, observers: Mapping[str, Observer]) -> Profile:
        """What was watched, as a profile without a target."""
        runs = self._runs()
        with _install(self.pipe, self.method, dict(self.modules), runs):
            layers = {name: run.layers for name, run in runs.items()}
        parts = {}
        for name, module in self.modules.items():
            seen, count = observers[name], len(layers[name])
            assert seen.geometry is not None
            curve = seen.curve(count, by_head=chooses_by_head(self.method.select))
            parts[name] = ComponentProfile(
                model=type(module).__name__,
                fingerprint=fingerprint(module),
                geometry=seen.geometry,
                layers=layers[name],
                heads=curve.output.shape[2],
                starts=seen.starts,
                density={ANY_BRANCH: torch.ones_like(curve.output)},
                orders=seen.orders(count) if self.fix_orders and self.control == "density" else (),
                dense_layers=tuple(sorted({i % count for i in self.method.dense_layers})),
                curve=curve,
            )
        adapter = find_adapter(next(iter(self.modules.values())))
        return Profile(
            method=self.method,
            components=parts,
            target=str(self.target),
            task="" if adapter is None else adapter.task,
            steps=next(iter(observers.values())).steps,
            made_on=made_on(),
        )

    def _with(self, profile: Profile, *, error: float | None = None, density: float | None = None) -> Profile:
        """The profile at one setting."""
        if self.control == "error":
            kept = {name: replace(part, density={}) for name, part in profile.components.items()}
            return replace(profile, components=kept, control="error", error=error)
        parts = {
            name: replace(part, density={ANY_BRANCH: densities_for(part, self.method, error=error, density=density)})
            for name, part in profile.components.items()
        }
        if error is None:
            expected = [expected_error(part, part.density[ANY_BRANCH]) for part in parts.values()]
            error = min(max(sum(expected) / len(expected), 1e-6), 0.999)
        return replace(profile, components=parts, error=error)

    def _measure(self, folder: WorkFolder, key: str, profile: Profile) -> tuple[float, float]:
        """Mean PSNR and work of a profile over the prompts."""
        found: list[tuple[float, float]] = []
        for index in range(len(self.prompts)):
            name = f"{key}-{index}"
            result = folder.result(name)
            if result is None:
                self._tell(f"prompt {index + 1} at {key}")
                dense = folder.tensors(f"dense-{index}")
                assert dense is not None
                with enabled(self.pipe, profile=profile, min_tokens=0) as handle:
                    made = self._generate(index)
                    densities = [status.density for status in handle.stats().values()]
                reached = max(psnr(made, dense[0]["pictures"]), 0.01)
                result = {"psnr": reached, "density": sum(densities) / len(densities)}
                folder.put_result(name, result)
            self._done += 1
            found.append((result["psnr"], result["density"]))
        return _mean([p for p, _ in found]), _mean([d for _, d in found])

    def _point(self, folder: WorkFolder, profile: Profile, error: float) -> QualityPoint:
        error = float(f"{error:.4g}")  # what a file name can tell apart
        reached, density = self._measure(folder, f"{self.control}-error-{error:g}", self._with(profile, error=error))
        return QualityPoint(error, reached, density)

    def _aimed(self, folder: WorkFolder, profile: Profile, points: list[QualityPoint]) -> Profile:
        """The profile at the target, with all that was measured."""
        if self.target.kind == "density":
            found = self._with(profile, density=self.target.value)
            reached, density = self._measure(folder, f"density-{self.target.value:.4g}", found)
            points = [*points, QualityPoint(float(f"{found.error or 0:.4g}"), reached, density)]
        elif self.target.kind == "error":
            points = [*points, self._point(folder, profile, self.target.value)]
            found = self._with(profile, error=self.target.value)
        else:
            points = self._search(folder, profile, points)
            found = self._with(profile, error=self._curve(points).error_for(self.target.value))
        curve = self._curve(points)
        last = min(points, key=lambda p: abs(math.log(p.error / (found.error or p.error))))
        measured = {"prompts": list(self.prompts), "error": last.error, "psnr": last.psnr, "density": last.density}
        return replace(found, curve=curve, measured=measured)

    def _search(self, folder: WorkFolder, profile: Profile, points: list[QualityPoint]) -> list[QualityPoint]:
        """Points whose PSNR comes near to the target, a few tries."""
        wanted, model = self.target.value, next(iter(profile.components.values())).model
        points = list(points)
        for _ in range(_MOST_TRIES):
            curve = self._curve(points) if points else stock_curve(model)[0]
            error = float(f"{curve.error_for(wanted):.4g}")
            if any(abs(math.log(p.error / error)) < 0.02 for p in points):
                break  # known already
            points.append(self._point(folder, profile, error))
            if abs(points[-1].psnr - wanted) <= _CLOSE_DB:
                break
        return points

    def _curve(self, points: Sequence[QualityPoint]) -> QualityCurve:
        known = {point.error: point for point in points}
        told = ", ".join(f"{key}={value}" for key, value in self.call.items() if isinstance(value, int | float | str))
        return QualityCurve(tuple(known.values()), f"{len(self.prompts)} prompts, {told}, {self._device()}")

    def _device(self) -> str:
        device = next(iter(next(iter(self.modules.values())).parameters())).device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def made_on() -> dict[str, Any]:
    """GPU and versions."""
    names = [gpu["name"] for gpu in gpus()]
    known = {key: value for key, value in versions().items() if value is not None}
    return {"gpu": names[0] if names else "none", "versions": known}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
