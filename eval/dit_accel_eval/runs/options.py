"""What a user asks of an evaluation, and the settings that follow from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dit_accel_eval.compare import Configuration
from dit_accel_eval.runs.errors import EvalError
from dit_accel_eval.runs.pipeline import call_arguments, describe
from dit_accel_eval.runs.prompts import CALIBRATION_PROMPTS, read_prompts, split_prompts
from dit_accel_eval.runs.quality import choose_metrics
from dit_accel_eval.runs.rows import build_rows, is_static
from dit_accel_eval.runs.settings import RunSettings

__all__ = ["EvalOptions", "read_run_settings"]


@dataclass(frozen=True)
class EvalOptions:
    """Options of :func:`dit_accel_eval.evaluate`.

    Attributes:
        methods: names of methods, see :func:`dit_accel.methods`.
        densities: work of the whole run over that of a dense run, planning and pooled keys included.
        configurations: rows instead of methods times densities.
        options: further options of :func:`dit_accel.enable` for all methods, such as ``{"warmup": 0.1}``.
        seeds: each prompt is generated with each of these seeds.
        steps: denoising steps; ``None`` is the pipeline's default, 8 on a CPU.
        frames: frames of a clip; ``None`` is the pipeline's default, 17 on a CPU.
        size: height and width in pixels; ``None`` is the pipeline's default, 128 x 128 on a CPU.
        guidance: scale of classifier-free guidance.
        call: further arguments of the pipeline call, of plain JSON types.
        metrics: presets and names, see :func:`dit_accel_eval.runs.quality.choose_metrics`; ``None`` is ``standard``,
            or ``quick`` where there is no GPU, without what this machine lacks.
        profile: extractors of distribution metrics and VBench, ``"offline"`` or ``"official"``.
        calibration: prompts for static methods, apart from those evaluated; ``None`` takes those behind ``limit``.
        limit: how many prompts to take.
        batch: prompts in one pipeline call.
        floor: whether dense with another seed is a row.
        attention: whether to compare attention outputs with dense, on the first prompt, in runs of their own.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: of the weights, ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        threads: CPU threads; ``None`` is torch's choice. A run that goes on keeps its own.
        retry_errors: whether samples that failed are made again.
        command: the command line, for the report.
    """

    methods: Sequence[str] = ("auto",)
    densities: Sequence[float] = (0.5,)
    configurations: Sequence[Configuration] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    seeds: Sequence[int] = (0,)
    steps: int | None = None
    frames: int | None = None
    size: tuple[int, int] | None = None
    guidance: float | None = None
    call: Mapping[str, Any] = field(default_factory=dict)
    metrics: Sequence[str] | None = None
    profile: str = "offline"
    calibration: Sequence[str] | None = None
    limit: int | None = None
    batch: int = 1
    floor: bool = True
    attention: bool = True
    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = None
    retry_errors: bool = False
    command: str = ""

    def rows(self) -> list[Configuration]:
        """The configurations to compare with dense.

        Raises:
            EvalError: see :func:`dit_accel_eval.runs.rows.build_rows`.
        """
        if self.configurations is not None:
            return list(self.configurations)
        return build_rows(self.methods, self.densities, self.options, floor=self.floor)

    def prompts(self, given: Sequence[str] | str | Path) -> tuple[list[str], list[str]]:
        """Prompts to generate, and those for calibration; ``given`` is a list or a file.

        Raises:
            EvalError: no prompts, or none left to calibrate a static method on.
        """
        every = read_prompts(given) if isinstance(given, str | Path) else list(given)
        chosen, others = split_prompts(every, self.limit, CALIBRATION_PROMPTS)
        if not chosen:
            raise EvalError("there must be at least one prompt")
        if not any(is_static(row) for row in self.rows()):
            return chosen, []
        others = list(self.calibration) if self.calibration is not None else others
        both = sorted({*chosen} & {*others})
        if both:
            raise EvalError(f"calibration prompts must be apart from those evaluated, {both} are in both")
        if not others:
            names = ", ".join(sorted({str(row.method) for row in self.rows() if is_static(row)}))
            raise EvalError(
                f"{names} must be calibrated on prompts apart from the {len(chosen)} that are evaluated, and none are "
                "left; give fewer with --limit, or others with --calibration-prompts"
            )
        return chosen, others

    def settings(
        self, pipe: Any, name: str | Path | None, given: Sequence[str] | str | Path, known: RunSettings | None
    ) -> RunSettings:
        """Settings of the run.

        Args:
            pipe: the loaded pipeline.
            name: its folder or name.
            given: prompts or their file.
            known: settings of the run that goes on, whose choice of metrics holds if this one leaves it open.

        Raises:
            EvalError: anything that does not fit.
        """
        prompts, calibration = self.prompts(given)
        if self.metrics is None and known is not None:
            kinds: dict[str, tuple[str, ...]] = {
                "metrics": known.metrics,
                "distribution": known.distribution,
                "vbench": known.vbench,
            }
        else:
            chosen = choose_metrics(self.metrics, self.profile)
            kinds = {"metrics": chosen.paired, "distribution": chosen.distribution, "vbench": chosen.vbench}
        call = call_arguments(
            pipe, steps=self.steps, frames=self.frames, size=self.size, guidance=self.guidance, more=self.call
        )
        return RunSettings(
            pipeline=describe(pipe, name),
            prompts=tuple(prompts),
            seeds=tuple(self.seeds),
            rows=tuple(self.rows()),
            call=call,
            profile=self.profile,
            calibration=tuple(calibration),
            batch=self.batch,
            attention=self.attention,
            threads=torch.get_num_threads() if self.threads is None else self.threads,
            command=self.command,
            **kinds,
        )


def read_run_settings(out: Path) -> RunSettings | None:
    """Settings of the run in a folder, ``None`` if there is none.

    Raises:
        EvalError: ``run.json`` is broken or of another version.
    """
    import json

    path = out / "run.json"
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvalError(f"{path} cannot be read: {error}; give another --out") from None
    try:
        return RunSettings.from_dict(data)
    except EvalError as error:
        raise EvalError(f"{path}: {error}") from None
