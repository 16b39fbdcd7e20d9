"""Dense against accelerated over many prompts: one record a sample, kept at once, so that a stopped run goes on."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import dit_accel
from dit_accel_eval.files import append_record, read_records
from dit_accel_eval.generate import Clips, generate
from dit_accel_eval.metrics import paired
from dit_accel_eval.video import Frames

__all__ = ["Configuration", "compare", "summarise"]

#: What :func:`summarise` averages.
METRICS = ("psnr", "psnr_clip", "ssim", "flicker_difference", "density", "seconds", "decode_seconds")


@dataclass(frozen=True)
class Configuration:
    """One row of a comparison.

    Attributes:
        name: name of the row, unique.
        method: method name, or ``None`` for dense attention.
        options: options of :func:`dit_accel.enable`.
        seed_offset: added to every seed; a dense row with another seed shows how far apart unrelated clips are.
        labels: further entries of each record.
    """

    name: str
    method: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    seed_offset: int = 0
    labels: Mapping[str, Any] = field(default_factory=dict)


def _batches(items: Sequence[str], size: int) -> Iterator[tuple[int, list[str]]]:
    for start in range(0, len(items), size):
        yield start, list(items[start : start + size])


def compare(
    pipe: Any,
    prompts: Sequence[str],
    configurations: Sequence[Configuration],
    out: str | Path,
    *,
    seed: int = 0,
    batch: int = 1,
    tag: str = "",
    on_record: Callable[[dict[str, Any]], None] | None = None,
    stop: Callable[[], bool] | None = None,
    **call: Any,
) -> list[dict[str, Any]]:
    """Generate each prompt dense and with each configuration, and measure the difference on raw frames.

    All configurations see the first prompts before any sees the next, so that rows of an unfinished comparison are over
    the same samples. Samples that ``out`` holds already are not made again.

    Args:
        pipe: a diffusers video pipeline.
        prompts: what to generate; prompt ``i`` gets seed ``seed + i``.
        configurations: what to compare with dense.
        out: JSON lines, one record for each prompt and configuration.
        seed: first seed.
        batch: prompts in one pipeline call; seconds are then the share of one clip.
        tag: whatever else must agree for a record in ``out`` to count, such as a digest of the weights.
        on_record: called with each new record.
        stop: asked before each configuration; true ends the comparison with what there is.
        **call: arguments of the pipeline call, such as ``num_frames``.

    Returns:
        All records. A configuration that cannot run leaves records with ``error`` in place of metrics.

    Raises:
        ValueError: a batch below 1, or names that are not unique.
    """
    names = [c.name for c in configurations]
    if len(set(names)) != len(names):
        raise ValueError(f"configurations must have names of their own, got {names}")
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    records = read_records(out)
    # A file of an earlier run with other settings must not pass for this one.
    settings = {key: value for key, value in sorted(call.items()) if isinstance(value, (int, float, str))}
    settings |= {"batch": batch, "tag": tag}
    known = {(r["name"], r["prompt"], r["seed"]) for r in records if r.get("call") == settings}
    records = [r for r in records if r.get("call") == settings]
    for start, group in _batches(prompts, batch):
        seeds = [seed + start + i for i in range(len(group))]
        missing = [c for c in configurations if any((c.name, p, s) not in known for p, s in zip(group, seeds))]
        if not missing:
            continue
        if stop is not None and stop():
            return records
        dense = generate(pipe, group, seeds, **call)
        for configuration in missing:
            if stop is not None and stop():
                return records
            for record in _measure(pipe, configuration, group, seeds, dense, call):
                if (record["name"], record["prompt"], record["seed"]) in known:
                    continue
                record["call"] = settings
                append_record(out, record)
                records.append(record)
                if on_record is not None:
                    on_record(record)
    return records


def _measure(
    pipe: Any, configuration: Configuration, prompts: list[str], seeds: list[int], dense: Clips, call: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Records of one configuration for one batch."""
    base = [
        {"name": configuration.name, "prompt": p, "seed": s, **configuration.labels} for p, s in zip(prompts, seeds)
    ]
    shifted = [s + configuration.seed_offset for s in seeds]
    more: dict[str, Any] = {"density": 1.0}
    try:
        if configuration.method is None:
            clips = generate(pipe, prompts, shifted, **call)
        else:
            with dit_accel.enabled(pipe, configuration.method, **configuration.options) as handle:
                clips = generate(pipe, prompts, shifted, **call)
                more = _engine(handle)
    except ValueError as error:  # such as a density that the warm-up alone exceeds
        return [{**record, "error": str(error)} for record in base]
    more["seconds"] = clips.denoise_seconds / len(prompts)
    more["decode_seconds"] = clips.decode_seconds / len(prompts)
    more["dense_seconds"] = dense.denoise_seconds / len(prompts)

    def place(clip: Frames) -> torch.Tensor:
        return torch.from_numpy(clip).to(pipe._execution_device)

    return [
        {**record, **paired(place(clip), place(reference)).to_dict(), **more}
        for record, clip, reference in zip(base, clips.frames, dense.frames)
    ]


def _engine(handle: dit_accel.Handle) -> dict[str, Any]:
    """What the engine counted, over the transformers of the pipeline."""
    stats = list(handle.stats().values())
    calls = sum(s.calls for s in stats)
    reasons: dict[str, int] = {}
    for s in stats:
        for reason, count in s.reasons.items():
            reasons[reason] = reasons.get(reason, 0) + count
    return {
        "density": sum(s.density * s.calls for s in stats) / max(calls, 1),
        "sparse_density": sum(s.sparse_density * s.sparse_calls for s in stats)
        / max(sum(s.sparse_calls for s in stats), 1),
        "backend": ", ".join(sorted({s.backend for s in stats if s.backend})),
        "plan_ms": sum(s.plan_ms for s in stats),
        "dense_calls": reasons,
        "notes": sorted({note for s in stats for note in s.notes}),
    }


def summarise(records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """Mean and standard deviation of each metric by configuration, in the order of ``names``."""
    rows = []
    for name in names:
        mine = [r for r in records if r["name"] == name]
        good = [r for r in mine if "error" not in r]
        row: dict[str, Any] = {"name": name, "samples": len(good)}
        if not good:
            row["error"] = mine[0]["error"] if mine else "not run"
            rows.append(row)
            continue
        for metric in METRICS:
            values = [float(r[metric]) for r in good if metric in r]
            if values:
                row[metric] = statistics.fmean(values)
                row[f"{metric}_std"] = statistics.stdev(values) if len(values) > 1 else 0.0
        rows.append(row)
    return rows
