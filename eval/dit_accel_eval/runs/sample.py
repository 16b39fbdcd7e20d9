"""Making the samples of one pipeline call: generate, measure, keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import dit_accel
from dit_accel_eval.compare import Configuration
from dit_accel_eval.extractors import MissingExtractorError
from dit_accel_eval.generate import Clips, generate
from dit_accel_eval.runs import quality
from dit_accel_eval.runs.calibrate import enable_options
from dit_accel_eval.runs.engine import engine_record
from dit_accel_eval.runs.errors import EvalError
from dit_accel_eval.runs.folder import RunFolder
from dit_accel_eval.runs.observer import Observer
from dit_accel_eval.runs.rows import DENSE
from dit_accel_eval.runs.settings import VERSION, RunSettings, Sample
from dit_accel_eval.video import Frames

__all__ = ["Maker"]

# What of a configuration that cannot run becomes its result. Errors of files, which stop everything, are not among them.
_RUN_ERRORS = (ValueError, TypeError, RuntimeError, NotImplementedError, ImportError, MemoryError)


@dataclass(frozen=True)
class Maker:
    """Makes samples of one run.

    Attributes:
        pipe: the pipeline.
        settings: of the run.
        folder: where records go.
        observer: who is told.
    """

    pipe: Any
    settings: RunSettings
    folder: RunFolder
    observer: Observer

    @property
    def device(self) -> torch.device:
        """Where metrics are computed."""
        return torch.device(self.pipe._execution_device)

    def group(self, group: Sequence[Sample]) -> None:
        """Make what is missing of the samples of one pipeline call, the baseline first.

        Raises:
            EvalError: dense attention cannot run, so that there is nothing to compare with; or a file is in the way.
        """
        for row in self.settings.all_rows:
            missing = [sample for sample in group if not self.folder.has(row.name, sample)]
            if missing:
                self.observer.sample(row.name, [self.settings.prompts[s.index] for s in group])
                self._row(row, group, missing)

    def _row(self, row: Configuration, group: Sequence[Sample], missing: Sequence[Sample]) -> None:
        """Generate the whole group, so that the batch is always the same, and keep what is missing."""
        references = {sample: self._reference(sample) for sample in missing} if row.name != DENSE else {}
        if references and all(isinstance(found, str) for found in references.values()):
            for sample, reason in references.items():
                self._keep(row, sample, {"error": reason}, None)
            return
        try:
            clips, engine, plan_ms = self._generate(row, group)
        except _RUN_ERRORS as error:
            if row.name == DENSE:
                raise EvalError(f"dense attention cannot run, so there is nothing to compare with: {error}") from error
            self._free()
            for sample in missing:
                self._keep(row, sample, {"error": str(error) or type(error).__name__}, None)
            return
        for place, sample in enumerate(group):
            if sample in missing:
                parts = self._measured(row, sample, clips, place, references.get(sample))
                first = sample == self.settings.samples[0]
                own = engine if first or not engine else {**engine, "density_map": None}
                speed = self._speed(clips, plan_ms, len(group))
                frames = None if place in clips.problems else clips.frames[place]
                self._keep(row, sample, {**parts, "engine": own, "speed": speed}, frames)

    def _free(self) -> None:
        """Give back what a failed call, such as one out of memory, held."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _reference(self, sample: Sample) -> Frames | str:
        """The dense clip of a sample, or why there is none."""
        error = self.folder.record(DENSE, sample).get("error")
        if error is not None:
            return f"the dense clip of this sample failed: {error}"
        return self.folder.clip(DENSE, sample)

    def _generate(self, row: Configuration, group: Sequence[Sample]) -> tuple[Clips, dict[str, Any], float]:
        prompts = [self.settings.prompts[sample.index] for sample in group]
        seeds = [sample.seed + row.seed_offset for sample in group]

        def on_step(done: int) -> None:
            self.observer.step(done, self.settings.steps)

        call: dict[str, Any] = {**self.settings.call, "on_step": on_step, "strict": False}
        if row.method is None:
            return generate(self.pipe, prompts, seeds, **call), {}, 0.0
        with dit_accel.enabled(self.pipe, row.method, **enable_options(row, self.folder)) as handle:
            clips = generate(self.pipe, prompts, seeds, **call)
            engine, plan_ms = engine_record(handle, with_map=group[0] == self.settings.samples[0])
        return clips, engine, plan_ms

    def _measured(
        self, row: Configuration, sample: Sample, clips: Clips, place: int, reference: Frames | str | None
    ) -> dict[str, Any]:
        """Metrics of one clip, or why there are none."""
        found: dict[str, Any] = {"metrics": {}, "vbench": {}, "notes": [], "error": None}
        if place in clips.problems:
            return {**found, "error": clips.problems[place]}
        if isinstance(reference, str):
            return {**found, "error": reference}
        clip = clips.frames[place]
        try:
            if reference is not None:
                labels = tuple(str(self.folder.clip_path(name, sample)) for name in (row.name, DENSE))
                values = quality.paired(clip, reference, self.settings.metrics, self.device, (labels[0], labels[1]))
                found["metrics"], found["notes"] = quality.finite(values)
            if self.settings.vbench:
                prompt = self.settings.prompts[sample.index]
                name = str(self.folder.clip_path(row.name, sample))
                values = quality.vbench(clip, prompt, self.settings, self.device, name)
                found["vbench"], notes = quality.finite(values)
                found["notes"] += notes
        except MissingExtractorError as error:  # not the clip's fault: the same run goes on once it is there
            raise EvalError(str(error)) from error
        except ValueError as error:
            found["error"] = f"measuring: {error}"
        return found

    def _speed(self, clips: Clips, plan_ms: float, count: int) -> dict[str, Any]:
        """Times, each the share of one clip of the call."""
        return {
            "encode_s": clips.encode_seconds / count,
            "denoise_s": clips.denoise_seconds / count,
            "decode_s": clips.decode_seconds / count,
            "plan_ms": plan_ms / count,
            "step_ms": [seconds * 1e3 / count for seconds in clips.step_seconds],
            "peak_bytes": clips.peak_bytes,
        }

    def _keep(self, row: Configuration, sample: Sample, parts: Mapping[str, Any], frames: Frames | None) -> None:
        record: dict[str, Any] = {
            "version": VERSION,
            "name": row.name,
            "prompt": self.settings.prompts[sample.index],
            "prompt_index": sample.index,
            "seed": sample.seed,
            "metrics": {},
            "vbench": {},
            "engine": {},
            "speed": {},
            "notes": [],
            **parts,
        }
        self.folder.save(row.name, sample, record, frames)
        self.observer.record(record, sample)
