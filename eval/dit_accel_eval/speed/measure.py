"""Dense and accelerated runs in turn, repeated; medians, spread, phases, memory, energy and the quality of the clips."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import dit_accel
from dit_accel_eval.generate import Clips, generate
from dit_accel_eval.runs.engine import engine_record
from dit_accel_eval.runs.errors import EvalError
from dit_accel_eval.runs.pipeline import call_arguments, describe
from dit_accel_eval.runs.prompts import CALIBRATION_PROMPTS
from dit_accel_eval.runs.rows import build_rows, is_static
from dit_accel_eval.speed.baseline import Baseline, choose_backend, compiled, using
from dit_accel_eval.speed.energy import EnergyMeter
from dit_accel_eval.speed.share import attention_share, ceiling

__all__ = ["BenchOptions", "bench"]

_SHORT = 2
_PHASES = ("encode_s", "denoise_s", "decode_s", "whole_s")


@dataclass(frozen=True)
class BenchOptions:
    """What :func:`bench` measures.

    Attributes:
        method: name of the method.
        density: work of the whole run over that of a dense run.
        prompt: what to generate.
        others: prompts that a static method is calibrated on.
        seed: of the noise.
        repeats: timed runs of each.
        warmup: runs of each before, not timed.
        steps, frames, size, guidance: see :class:`dit_accel_eval.EvalOptions`.
        options: further options of :func:`dit_accel.enable`.
        compile: whether to compile the blocks of the transformer, for both.
        dense_backend: diffusers' name of the dense backend; ``None`` tries all that are here and takes the fastest.
    """

    method: str = "auto"
    density: float | None = 0.5
    prompt: str = "octopus"
    others: Sequence[str] = ()
    seed: int = 0
    repeats: int = 5
    warmup: int = 1
    steps: int | None = None
    frames: int | None = None
    size: tuple[int, int] | None = None
    guidance: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    compile: bool = False
    dense_backend: str | None = None

    def check(self) -> None:
        """Check what can be checked before a pipeline is loaded.

        Raises:
            EvalError: a number is out of range, or the method or an option of it is unknown.
        """
        if self.repeats < 1 or self.warmup < 0:
            raise EvalError(f"repeats must be at least 1 and warmup at least 0, got {self.repeats} and {self.warmup}")
        if not self.prompt.strip():
            raise EvalError("prompt must not be empty")
        build_rows([self.method], [] if self.density is None else [self.density], self.options, floor=False)


@dataclass
class _Timed:
    """Runs of one kind."""

    clips: list[Clips] = field(default_factory=list)
    joules: list[float] = field(default_factory=list)
    engine: dict[str, Any] = field(default_factory=dict)
    plan_ms: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {name: _spread([_phase(clip, name) for clip in self.clips]) for name in _PHASES}
        found["step_ms"] = _spread([seconds * 1e3 for clip in self.clips for seconds in clip.step_seconds])
        by_step = zip(*(clip.step_seconds for clip in self.clips))
        found["step_ms_by_step"] = [statistics.median(seconds) * 1e3 for seconds in by_step]
        peaks = [clip.peak_bytes for clip in self.clips if clip.peak_bytes is not None]
        found["peak_bytes"] = max(peaks) if peaks else None
        found["energy_j"] = _spread(self.joules) if self.joules else None
        return found


def _phase(clip: Clips, name: str) -> float:
    parts = {"encode_s": clip.encode_seconds, "denoise_s": clip.denoise_seconds, "decode_s": clip.decode_seconds}
    return parts[name] if name in parts else sum(parts.values())


def _spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles and extremes."""
    low, high = (values[0], values[0])
    if len(values) > 1:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return {
        "median": statistics.median(values),
        "quartiles": [low, high],
        "min": min(values),
        "max": max(values),
        "count": len(values),
    }


def bench(
    pipe: Any, options: BenchOptions | None = None, *, note: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Time dense and accelerated runs of one prompt.

    Runs of both alternate, so that a machine that slows down slows both. Compilation, self-tests and calibration are
    done before; the device is waited for at the ends of phases. Every result holds PSNR and SSIM of the clips timed.

    Args:
        pipe: a diffusers pipeline.
        options: what to measure.
        note: called with a line for each part.

    Returns:
        ``dense`` and ``accelerated`` with medians and spread by phase, ``speedup``, attention's ``share`` of dense
        denoising and the ``ceiling`` it sets, ``quality``, ``engine`` and what it was measured on.

    Raises:
        EvalError: a number out of range, or a method that must be calibrated without prompts for it.
        ValueError: the method cannot run.
    """
    options = options or BenchOptions()
    options.check()
    call = call_arguments(
        pipe, steps=options.steps, frames=options.frames, size=options.size, guidance=options.guidance
    )
    note("choosing the dense backend")
    baseline = choose_backend(pipe, lambda: _dense_steps(pipe, options, call), options.dense_backend)
    with using(pipe, baseline.name), compiled(pipe, options.compile):
        enable = _enable_options(pipe, options, call, note)
        dense, fast, meter = _measure(pipe, options, call, enable, note)
        note("timing the attention calls of a dense run")
        share = attention_share(pipe, lambda: _once(pipe, options, call).denoise_seconds)
    return _result(pipe, options, call, baseline, dense, fast, meter, share)


def _dense_steps(pipe: Any, options: BenchOptions, call: Mapping[str, Any]) -> float:
    short = {**call, "num_inference_steps": _SHORT}
    return generate(pipe, [options.prompt], [options.seed], decode=False, **short).denoise_seconds


def _once(pipe: Any, options: BenchOptions, call: Mapping[str, Any]) -> Clips:
    return generate(pipe, [options.prompt], [options.seed], **dict(call))


def _enable_options(
    pipe: Any, options: BenchOptions, call: Mapping[str, Any], note: Callable[[str], None]
) -> dict[str, Any]:
    """Options of :func:`dit_accel.enable`; static methods are calibrated here."""
    densities = [] if options.density is None else [options.density]
    row = build_rows([options.method], densities, options.options, floor=False)[0]
    if not is_static(row):
        return dict(row.options)
    others = [prompt for prompt in options.others if prompt != options.prompt][:CALIBRATION_PROMPTS]
    if not others:
        raise EvalError(
            f"{options.method} must be calibrated on other prompts than {options.prompt!r}; none were given"
        )
    note(f"calibrating {options.method} on {len(others)} other prompts")
    kept = {key: row.options[key] for key in ("backend", "min_tokens") if key in row.options}
    overrides = {key: value for key, value in row.options.items() if key not in kept}
    generator = torch.Generator("cpu").manual_seed(options.seed)
    arguments = {**call, "output_type": "latent", "generator": generator}
    return {**kept, "plan": dit_accel.calibrate(pipe, others, options.method, overrides=overrides, **arguments)}


def _measure(
    pipe: Any,
    options: BenchOptions,
    call: Mapping[str, Any],
    enable: Mapping[str, Any],
    note: Callable[[str], None],
) -> tuple[_Timed, _Timed, EnergyMeter]:
    meter = EnergyMeter(torch.device(pipe._execution_device))
    dense, fast = _Timed(), _Timed()
    for index in range(options.warmup + options.repeats):
        timed = index >= options.warmup
        note(f"run {index - options.warmup + 1} of {options.repeats}" if timed else "warm-up run")
        _add(dense if timed else _Timed(), meter, lambda: _once(pipe, options, call))
        with dit_accel.enabled(pipe, options.method, **dict(enable)) as handle:
            kept = fast if timed else _Timed()
            _add(kept, meter, lambda: _once(pipe, options, call))
            kept.engine, plan_ms = engine_record(handle)
            kept.plan_ms.append(plan_ms)
    return dense, fast, meter


def _add(kept: _Timed, meter: EnergyMeter, run: Callable[[], Clips]) -> None:
    before = meter.joules()
    kept.clips.append(run())
    after = meter.joules()
    if before is not None and after is not None:
        kept.joules.append(after - before)


def _result(
    pipe: Any,
    options: BenchOptions,
    call: Mapping[str, Any],
    baseline: Baseline,
    dense: _Timed,
    fast: _Timed,
    meter: EnergyMeter,
    share: float | None,
) -> dict[str, Any]:
    from dit_accel.env import collect
    from dit_accel_eval.metrics import paired

    quality = paired(fast.clips[-1].frames[0], dense.clips[-1].frames[0]).to_dict()
    one, two = dense.to_dict(), fast.to_dict()
    density = fast.engine["density"]
    return {
        "version": 1,
        "pipeline": describe(pipe),
        "prompt": options.prompt,
        "seed": options.seed,
        "call": dict(call),
        "method": options.method,
        "options": {**options.options, "density": options.density},
        "baseline": {
            "name": baseline.describe(options.compile, torch.device(pipe._execution_device)),
            "backend": baseline.name,
            "compiled": options.compile,
            "tried_s": dict(baseline.seconds),
            "refused": dict(baseline.refused),
        },
        "dense": one,
        "accelerated": {**two, "plan_ms": _spread(fast.plan_ms)},
        "speedup": {name: one[name]["median"] / two[name]["median"] for name in ("denoise_s", "whole_s")},
        "attention": {
            "share": share,
            "ceiling": None if share is None else ceiling(share, density),
            "ceiling_without_attention": None if share is None or share >= 1 else ceiling(share, 0.0),
        },
        "quality": quality,
        "engine": fast.engine,
        "energy": meter.missing or "of the whole GPU, by NVML's counter",
        "environment": collect(),
    }
