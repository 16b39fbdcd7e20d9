"""``results.json``: every row's means over its samples. The same records give the same bytes, times aside."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dit_accel_eval.compare import Configuration
from dit_accel_eval.runs import quality
from dit_accel_eval.runs.folder import RunFolder
from dit_accel_eval.runs.rows import DENSE
from dit_accel_eval.runs.settings import VERSION, RunSettings

__all__ = ["mean_std_ci", "summarise_run", "without_times"]

_TIMES = ("encode_s", "denoise_s", "decode_s", "plan_ms", "step_ms")


def mean_std_ci(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, standard deviation and half the width of the 95 % confidence interval of the mean (Student's t).

    The last two are ``None`` for a single value.
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return {"mean": mean, "std": None, "ci95": None}
    from scipy.stats import t

    std = statistics.stdev(values)
    half = float(t.ppf(0.975, len(values) - 1)) * std / math.sqrt(len(values))
    return {"mean": mean, "std": std, "ci95": half}


def summarise_run(settings: RunSettings, folder: RunFolder, device: torch.device) -> dict[str, Any]:
    """Summary of the records that are there.

    Args:
        settings: of the run.
        folder: of the run.
        device: where networks of metrics over all clips run.

    Returns:
        The content of ``results.json``: ``rows`` in the order of the run, the baseline first.
    """
    dense = folder.records(DENSE, settings.samples)
    rows = [_row(row, settings, folder, dense, device) for row in settings.all_rows]
    return {"version": VERSION, "rows": rows, "extractors": quality.extractor_ids(settings)}


def _row(
    row: Configuration,
    settings: RunSettings,
    folder: RunFolder,
    dense: Sequence[Mapping[str, Any]],
    device: torch.device,
) -> dict[str, Any]:
    records = folder.records(row.name, settings.samples)
    good = [record for record in records if record["error"] is None]
    found: dict[str, Any] = {
        "name": row.name,
        "method": row.method,
        "target": row.labels.get("target"),
        "samples": len(good),
        "failed": len(records) - len(good),
        "metrics": _means(good, "metrics", settings.metrics),
        "distribution": _distribution(row, settings, folder, len(good), device),
        "vbench": _vbench(good, settings),
        "speed": _speed(good, [record for record in dense if record["error"] is None]),
        "density": _density(good),
        "reasons": _reasons(good),
        "notes": sorted({note for record in good for note in _notes(record)}),
    }
    if row.method is not None and settings.attention and folder.attention_path(row.name).is_file():
        found["attention"] = folder.read(folder.attention_path(row.name)).get("summary")
    errors = [record["error"] for record in records if record["error"] is not None]
    if errors:
        found["error"] = errors[0]
    return found


def _means(records: Sequence[Mapping[str, Any]], part: str, names: Sequence[str]) -> dict[str, Any]:
    """Mean and spread of each number, over the records where it is finite."""
    found: dict[str, Any] = {}
    for name in names:
        values = [record[part].get(name) for record in records]
        there = [float(value) for value in values if value is not None]
        if there:
            found[name] = mean_std_ci(there)
    return found


def _vbench(records: Sequence[Mapping[str, Any]], settings: RunSettings) -> dict[str, Any]:
    found = _means(records, "vbench", settings.vbench)
    totals = quality.vbench_totals({name: value["mean"] for name, value in found.items()}, settings)
    return {**found, "totals": totals} if totals else found


def _distribution(
    row: Configuration, settings: RunSettings, folder: RunFolder, good: int, device: torch.device
) -> dict[str, Any]:
    """Metrics over all clips, computed once and kept for as long as the samples are these."""
    if not settings.distribution or not good or row.name == DENSE:
        return {}
    path = folder.path / "distribution" / f"{folder.slugs[row.name]}.json"
    if path.is_file():
        known = folder.read(path)
        if known.get("samples") == good:
            values: dict[str, Any] = known["values"]
            return values
    computed = _plain(quality.distribution(settings, folder, row.name, device))
    path.parent.mkdir(exist_ok=True)
    folder.write(path, {"samples": good, "values": computed})
    return dict(computed)


def _plain(value: Any) -> Any:
    """JSON types; what is not finite becomes ``None``."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _density(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    engines = [record["engine"] for record in records if record["engine"]]
    if not engines:
        return {}
    names = {"run": "density", "sparse": "sparse_density", "plan_work": "plan_work"}
    found: dict[str, Any] = {key: statistics.fmean(e[name] for e in engines) for key, name in names.items()}
    steps = sorted({int(step) for engine in engines for step in engine["density_by_step"]})
    by_step = {s: [e["density_by_step"][str(s)] for e in engines if str(s) in e["density_by_step"]] for s in steps}
    found["by_step"] = {str(step): statistics.fmean(values) for step, values in by_step.items()}
    found["backend"] = ", ".join(sorted({engine["backend"] for engine in engines if engine["backend"]}))
    return found


def _reasons(records: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    found: dict[str, int] = {}
    for record in records:
        for reason, count in record["engine"].get("reasons", {}).items():
            found[reason] = found.get(reason, 0) + count
    return dict(sorted(found.items()))


def _notes(record: Mapping[str, Any]) -> list[str]:
    return [*record.get("notes", []), *record["engine"].get("notes", [])]


def _speed(records: Sequence[Mapping[str, Any]], dense: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over the samples; the speed-up is over the denoising loops of the samples that both have."""
    if not records:
        return {}
    found: dict[str, Any] = {}
    for name in _TIMES:
        values = [record["speed"][name] for record in records]
        flat = [statistics.median(v) if isinstance(v, list) and v else v for v in values]
        numbers = [float(v) for v in flat if isinstance(v, int | float)]
        found[name] = _spread(numbers)
    peaks = [record["speed"]["peak_bytes"] for record in records if record["speed"]["peak_bytes"] is not None]
    found["peak_bytes"] = max(peaks) if peaks else None
    key = ("prompt_index", "seed")
    theirs = {tuple(r[k] for k in key): r["speed"]["denoise_s"] for r in dense}
    pairs = [(theirs[place], r["speed"]["denoise_s"]) for r in records if (place := tuple(r[k] for k in key)) in theirs]
    own = sum(mine for _, mine in pairs)
    found["speedup"] = sum(other for other, _ in pairs) / own if own > 0 else None
    return found


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def without_times(results: Any) -> Any:
    """Results, or a sample's record, without its measurements of time and memory: what must not depend on interruptions."""
    if isinstance(results, Mapping):
        return {key: without_times(value) for key, value in results.items() if key != "speed"}
    if isinstance(results, list):
        return [without_times(value) for value in results]
    return results
