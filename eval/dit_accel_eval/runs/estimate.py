"""What a run will take, from what was measured: records that are there, or two dense steps. Nothing is guessed."""

from __future__ import annotations

import io
import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np

from dit_accel_eval.generate import generate
from dit_accel_eval.runs.folder import RunFolder
from dit_accel_eval.runs.rows import DENSE
from dit_accel_eval.runs.settings import RunSettings

__all__ = ["Estimate", "estimate_from_probe", "estimate_from_records"]

_STEPS = 2


@dataclass(frozen=True)
class Estimate:
    """Time and disk that the rest of a run will take.

    Attributes:
        samples: samples that are missing.
        seconds: generating them on one process, ``None`` if unknown; metrics are not counted.
        bytes: their clips on disk, ``None`` if unknown.
        basis: where the numbers come from, in words.
    """

    samples: int
    seconds: float | None
    bytes: int | None
    basis: str


def estimate_from_records(settings: RunSettings, folder: RunFolder) -> Estimate:
    """From the records that are there: each row at its own median, rows without one at that of dense."""
    missing = folder.missing(settings)
    medians = {row.name: _median(folder.records(row.name, settings.samples)) for row in settings.all_rows}
    dense = medians[DENSE]
    times = [medians[name] if medians[name] is not None else dense for name, _ in missing]
    sizes = [path.stat().st_size for path in folder.path.glob("samples/*/*.npz")]
    known = [time for time in times if time is not None]
    return Estimate(
        len(missing),
        sum(known) if len(known) == len(times) else None,
        round(statistics.fmean(sizes) * len(missing)) if sizes else None,
        f"{len(sizes)} finished samples" if sizes else "nothing was measured yet; --probe runs two dense steps",
    )


def _median(records: list[dict[str, Any]]) -> float | None:
    parts = ("encode_s", "denoise_s", "decode_s")
    times = [sum(record["speed"][part] for part in parts) for record in records if record.get("error") is None]
    return statistics.median(times) if times else None


def estimate_from_probe(pipe: Any, settings: RunSettings, missing: int) -> Estimate:
    """From two dense steps and one decoding: every row is counted as dense, for how much faster one is nobody knows."""
    call = {**settings.call, "num_inference_steps": _STEPS}
    prompt, seed = [settings.prompts[0]] * settings.batch, list(range(settings.batch))
    generate(pipe, prompt, seed, decode=False, **{**call, "num_inference_steps": 1})
    clips = generate(pipe, prompt, seed, **call)
    step = statistics.median(clips.step_seconds)
    steps = settings.steps
    seconds = None
    if steps is not None:
        seconds = (clips.encode_seconds + step * steps + clips.decode_seconds) / settings.batch * missing
    packed = io.BytesIO()
    np.savez_compressed(packed, frames=clips.frames)
    return Estimate(
        missing,
        seconds,
        round(packed.tell() / settings.batch * missing),
        f"{_STEPS} dense steps of {step:.2f} s and one decoding of {clips.decode_seconds:.2f} s, measured now; every "
        "configuration is counted as dense",
    )
