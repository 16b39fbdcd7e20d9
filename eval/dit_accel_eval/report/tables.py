"""Tables of the report: metrics with their convention, reasons for dense calls, where the work went."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dit_accel_eval.report.describe import Description, describe
from dit_accel_eval.report.folder import Row, Run, Sample, number

__all__ = [
    "Cell",
    "MetricLine",
    "attention_table",
    "dense_reasons",
    "density_cube",
    "extra_tables",
    "flat",
    "metric_names",
    "metric_table",
    "notes",
    "planning",
    "work_by_step",
]


@dataclass(frozen=True)
class Cell:
    """Mean, standard deviation, confidence interval and number of samples of one metric of one configuration."""

    mean: float
    std: float | None
    ci95: tuple[float, float] | None
    count: int


@dataclass(frozen=True)
class MetricLine:
    """One metric over all configurations; ``best`` names those with the best mean."""

    description: Description
    cells: Mapping[str, Cell]
    best: frozenset[str] = field(default_factory=frozenset)


def metric_names(run: Run) -> list[str]:
    """Metrics of the run in the order asked for, then whatever else samples hold."""
    asked = [str(name) for name in run.settings.get("metrics") or []]
    found = [name for samples in run.samples.values() for sample in samples for name in sample.metrics]
    present = set(found)
    return [*dict.fromkeys(name for name in [*asked, *found] if name in present)]


def _interval(value: Any) -> tuple[float, float] | None:
    """A confidence interval as low and high, from a pair."""
    if isinstance(value, list | tuple) and len(value) == 2:
        low, high = number(value[0]), number(value[1])
        if low is not None and high is not None:
            return low, high
    return None


def _cell(run: Run, row: Row, metric: str, summary: Mapping[str, Any]) -> Cell | None:
    values = [v for v in (s.metrics.get(metric) for s in run.good(row.name)) if v is not None]
    if not values:
        return None
    mean = statistics.fmean(values)
    told = summary.get(metric) or {}
    half = number(told.get("ci95"))
    interval = (mean - half, mean + half) if half is not None else _interval(told.get("ci95"))
    return Cell(mean, statistics.stdev(values) if len(values) > 1 else None, interval, len(values))


def metric_table(run: Run) -> list[MetricLine]:
    """Every metric of the samples, recomputed from them; intervals come from ``results.json``."""
    summaries = {
        str(r.get("name")): r.get("metrics") or {} for r in run.results.get("rows") or [] if isinstance(r, dict)
    }
    lines = []
    for name in metric_names(run):
        description = describe(name)
        cells = {}
        for row in run.rows:
            cell = _cell(run, row, name, summaries.get(row.name, {}))
            if cell is not None:
                cells[row.name] = cell
        rivals = {row.name: cells[row.name].mean for row in run.rows if row.accelerated and row.name in cells}
        best: frozenset[str] = frozenset()
        if description.known and len(rivals) > 1:
            target = max(rivals.values()) if description.higher_is_better else min(rivals.values())
            best = frozenset(n for n, value in rivals.items() if value == target)
        lines.append(MetricLine(description, cells, best))
    return lines


def flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Leaves of nested mappings with dotted names; lists are left whole."""
    if isinstance(value, Mapping):
        return [leaf for key, inner in value.items() for leaf in flat(inner, f"{prefix}.{key}" if prefix else str(key))]
    return [(prefix, value)]


def _spread(value: Mapping[str, Any]) -> str | None:
    """Mean or median with its spread as text; ``None`` for other mappings."""
    mean, median = number(value.get("mean")), number(value.get("median"))
    if mean is not None:
        std = number(value.get("std"))
        return f"{mean:.4g}" if std is None else f"{mean:.4g} ± {std:.2g}"
    if median is not None:
        low, high = number(value.get("min")), number(value.get("max"))
        return (
            f"{median:.4g}" if low is None or high is None or low == high else f"{median:.4g} ({low:.4g} to {high:.4g})"
        )
    return None


def _texts(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Leaves of nested mappings as text; a mean with its spread is one leaf."""
    if isinstance(value, Mapping):
        whole = _spread(value)
        if whole is None or not prefix:
            parts = [(f"{prefix}.{key}" if prefix else str(key), inner) for key, inner in value.items()]
            return [leaf for name, inner in parts for leaf in _texts(inner, name)]
        return [(prefix, whole)]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return [(prefix, "–" if value is None else str(value))]
    return [(prefix, f"{value:.4g}" if isinstance(value, float) else str(value))]


def extra_tables(run: Run, key: str) -> dict[str, dict[str, str]]:
    """Values of ``distribution``, ``vbench`` or ``speed`` in the summary: by name, then by configuration, as text."""
    table: dict[str, dict[str, str]] = {}
    for row in run.results.get("rows") or []:
        for name, text in _texts(row.get(key)) if isinstance(row, dict) and row.get(key) else []:
            table.setdefault(name, {})[str(row.get("name"))] = text
    return table


def attention_table(run: Run) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Attention outputs against dense: by layer (``"all layers"`` first), then by configuration, the numbers."""
    table: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in run.results.get("rows") or []:
        found = row.get("attention") if isinstance(row, dict) else None
        if isinstance(found, Mapping):
            name = str(row.get("name"))
            table.setdefault("all layers", {})[name] = found
            for layer in found.get("by_layer") or []:
                table.setdefault(str(layer.get("name")), {})[name] = layer
    return table


def dense_reasons(samples: Sequence[Sample]) -> list[tuple[str, int]]:
    """Dense attention calls by reason over all samples, the most frequent first."""
    total: Counter[str] = Counter()
    for sample in samples:
        for reason, count in (sample.engine.get("reasons") or {}).items():
            total[str(reason)] += int(count)
    return total.most_common()


def notes(samples: Sequence[Sample]) -> list[str]:
    """What the engine and the metrics noted, each once."""
    found = (note for sample in samples for note in [*(sample.engine.get("notes") or []), *sample.notes])
    return list(dict.fromkeys(map(str, found)))


def work_by_step(samples: Sequence[Sample]) -> list[tuple[int, float]]:
    """Work over dense work by step, mean over samples."""
    found: dict[int, list[float]] = {}
    for sample in samples:
        for step, value in (sample.engine.get("density_by_step") or {}).items():
            work = number(value)
            if work is not None:
                found.setdefault(int(step), []).append(work)
    return [(step, statistics.fmean(values)) for step, values in sorted(found.items())]


def planning(samples: Sequence[Sample]) -> dict[str, Any]:
    """Plans of one run on average, their time and work, how often they were used again, and the backend."""

    def average(values: Sequence[float | None]) -> float | None:
        there = [value for value in values if value is not None]
        return statistics.fmean(there) if there else None

    return {
        "plans": average([number(s.engine.get("plans")) for s in samples]),
        "reused": average([number(s.engine.get("cache_hits")) for s in samples]),
        "work": average([number(s.engine.get("plan_work")) for s in samples]),
        "ms": average([number(s.speed.get("plan_ms")) for s in samples]),
        "sparse_density": average([number(s.engine.get("sparse_density")) for s in samples]),
        "backend": ", ".join(sorted({str(s.engine["backend"]) for s in samples if s.engine.get("backend")})),
    }


def _cube(values: Any) -> Any:
    """Nested lists ``[step][layer][head]`` as an array, NaN where a layer has fewer heads or was not called."""
    import numpy as np

    try:
        heads = max(len(layer) for step in values for layer in step)
        cube = np.full((len(values), len(values[0]), heads), np.nan)
        for s, step in enumerate(values):
            for i, layer in enumerate(step):
                cube[s, i, : len(layer)] = [np.nan if value is None else value for value in layer]
    except (TypeError, ValueError, IndexError):
        return None
    return cube if cube.size else None


def density_cube(samples: Sequence[Sample]) -> dict[str, Any] | None:
    """Share of the map computed by step, layer and head, in thousandths, mean over the samples that recorded it.

    Returns:
        ``{"steps": [...], "layers": [...], "values": [step][layer][head], "samples": n}``, or ``None``.
    """
    import numpy as np

    cubes: list[Any] = []
    steps, names = None, None
    for sample in samples:
        recorded = sample.engine.get("density_map")
        if not isinstance(recorded, Mapping):
            continue
        cube = _cube(recorded.get("values"))
        if cube is None or (cubes and (cube.shape != cubes[0].shape or recorded.get("steps") != steps)):
            continue
        cubes.append(cube)
        steps = recorded.get("steps")
        names = names or [str(layer.get("name", "")) for layer in sample.engine.get("layers") or []]
    if not cubes or not steps or len(steps) != len(cubes[0]):
        return None
    stack = np.stack(cubes)
    known = np.isfinite(stack).sum(0)
    mean = np.nan_to_num(stack).sum(0) / np.maximum(known, 1)
    thousandths = np.where(known > 0, np.rint(mean * 1000), -1).astype(int)
    layers = names if names and len(names) == mean.shape[1] else [f"layer {i}" for i in range(mean.shape[1])]
    return {"steps": list(steps), "layers": layers, "values": thousandths.tolist(), "samples": len(cubes)}
