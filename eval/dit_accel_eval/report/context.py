"""What the templates of the report are given, all but the clips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dit_accel_eval.report.charts import DENSE_LINE, TIMELINE_HEIGHT, Bar, Point, Scatter, timeline
from dit_accel_eval.report.folder import DENSE, Row, Run, Sample, number
from dit_accel_eval.report.tables import (
    MetricLine,
    attention_table,
    dense_reasons,
    density_cube,
    extra_tables,
    flat,
    metric_table,
    notes,
    planning,
    work_by_step,
)
from dit_accel_eval.report.verdict import METRIC, Verdict, judge, mean, worst_first

__all__ = ["MOST_SAMPLES", "build_context"]

#: Rows of the table of all samples; the worst come first.
MOST_SAMPLES = 400


@dataclass(frozen=True)
class ParetoPair:
    """Quality against work and against time, in one metric."""

    metric: str
    work: Scatter | None
    time: Scatter | None


@dataclass(frozen=True)
class WorkPart:
    """Where one configuration's work went."""

    number: int
    row: Row
    bars: Sequence[Bar]
    planning: Mapping[str, Any]
    reasons: Sequence[tuple[str, int]]
    notes: Sequence[str]


@dataclass(frozen=True)
class SampleLine:
    """One line of the table of all samples."""

    sample: Sample
    number: int
    value: float | None
    floor: float | None


def _pareto(run: Run, verdicts: Sequence[Verdict], line: MetricLine) -> ParetoPair:
    metric, higher = line.description.name, line.description.higher_is_better
    floor = mean([line.cells[r.name].mean for r in run.rows if r.floor and r.name in line.cells])
    cells = [(i, v, line.cells[v.row.name].mean) for i, v in enumerate(verdicts, 1) if v.row.name in line.cells]

    def chart(xs: Sequence[tuple[int, float, float, str]], label: str, **kind: Any) -> Scatter | None:
        points = [Point(i, x, y, text) for i, x, y, text in xs]
        title = f"{metric} against {label.split(' (')[0]}"
        if not points:
            return None
        return Scatter(title, label, metric, points, floor, 1.0, higher_y=higher, **kind)

    def told(verdict: Verdict, x: str, y: float) -> str:
        return f"{verdict.row.name}: {metric} {y:.4g}, {x}"

    works = [(i, v.work, y, told(v, f"work {v.work:.3f}", y)) for i, v, y in cells if v.work is not None]
    times = [
        (i, v.speedup, y, told(v, f"{v.speedup:.2f} times as fast", y)) for i, v, y in cells if v.speedup is not None
    ]
    return ParetoPair(
        metric,
        chart(works, "attention work of the run (dense = 1)"),
        chart(times, "speed of the denoising loop (dense = 1)", lower_x=False),
    )


def _steps(run: Run) -> int:
    """Length of the longest timeline."""
    asked = run.settings.get("call") or {}
    known = [int(asked[key]) for key in ("steps", "num_inference_steps") if isinstance(asked.get(key), int)]
    seen = [step + 1 for samples in run.samples.values() for s in samples for step, _ in work_by_step([s])]
    return max([*known, *seen, 1])


def _work(run: Run, verdicts: Sequence[Verdict]) -> list[WorkPart]:
    steps, parts = _steps(run), []
    for number_, verdict in enumerate(verdicts, 1):
        samples = run.good(verdict.row.name)
        if samples:
            bars = timeline(work_by_step(samples), steps)
            parts.append(
                WorkPart(number_, verdict.row, bars, planning(samples), dense_reasons(samples), notes(samples))
            )
    return parts


def _sample_lines(run: Run, verdicts: Sequence[Verdict]) -> list[SampleLine]:
    floor = {s.key: s.metrics.get(METRIC) for r in run.rows if r.floor for s in run.good(r.name)}
    lines = []
    for position, verdict in enumerate(verdicts, 1):
        for sample in run.samples.get(verdict.row.name, ()):
            lines.append(SampleLine(sample, position, sample.metrics.get(METRIC), floor.get(sample.key)))
    return sorted(lines, key=lambda one: (one.sample.error is None, float("inf") if one.value is None else one.value))


def _failures(errors: Sequence[Sample]) -> list[dict[str, Any]]:
    """Failed samples of one configuration with one error, together."""
    found: dict[tuple[str, str], list[int]] = {}
    for sample in errors:
        found.setdefault((sample.name, str(sample.error)), []).append(sample.index)
    return [
        {"name": name, "error": error, "count": len(indices), "prompts": sorted(set(indices))}
        for (name, error), indices in found.items()
    ]


def _state(run: Run) -> dict[str, Any]:
    missing, errors = run.missing(), run.errors()
    planned = len(run.expected_keys) * len(run.rows)
    lacking = sum(len(keys) for keys in missing.values())
    frames = sum(sample.frames is None for row in run.rows for sample in run.good(row.name))
    undefined = sum(value is None for row in run.rows for s in run.good(row.name) for value in s.metrics.values())
    return {
        "title": "This run is not finished"
        if lacking or not planned
        else "Some samples failed"
        if errors
        else "Remarks",
        "finished": not lacking and not errors and bool(run.results) and planned > 0,
        "planned": planned,
        "made": planned - lacking - len(errors),
        "missing": missing,
        "errors": errors,
        "failures": _failures(errors),
        "no_frames": frames,
        "undefined": undefined,
    }


def _environment(run: Run) -> list[tuple[str, str]]:
    def text(value: Any) -> str:
        if isinstance(value, list):
            return "; ".join(text(v) for v in value) or "none"
        if isinstance(value, Mapping):
            return ", ".join(f"{key} {text(inner)}" for key, inner in value.items())
        return "not installed" if value is None else str(value)

    found = []
    for name, value in flat(run.settings.get("environment") or {}):
        if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            # A list of things: one entry each, under the name that it has.
            found += [
                (f"{name}.{item.get('name', i)}", text({k: v for k, v in item.items() if k != "name"}))
                for i, item in enumerate(value)
            ]
        else:
            found.append((name, text(value)))
    return found


def _extractors(run: Run) -> list[tuple[str, str]]:
    return [(str(name), str(digest or "not pinned")) for name, digest in (run.results.get("extractors") or {}).items()]


def build_context(run: Run, title: str | None = None) -> dict[str, Any]:
    """Values for ``report.html.j2`` and the summary.

    Args:
        run: the run.
        title: headline, ``None`` for one made from the pipeline's name.
    """
    verdicts = judge(run)
    pipeline = run.settings.get("pipeline") or {}
    lines = metric_table(run)
    pairs = [
        _pareto(run, verdicts, line) for line in lines if line.description.known or line.description.name == METRIC
    ]
    dense = [number(s.speed.get("denoise_s")) for s in run.good(DENSE)]
    samples = _sample_lines(run, verdicts)
    return {
        "title": title or f"What speed cost: {pipeline.get('id') or pipeline.get('class') or run.folder.name}",
        "run": run,
        "pipeline": pipeline,
        "verdicts": verdicts,
        "floor": mean([s.metrics.get(METRIC) for r in run.rows if r.floor for s in run.good(r.name)]),
        "dense_seconds": mean(dense),
        "state": _state(run),
        "worst": worst_first(run),
        "pareto": [pair for pair in pairs if pair.work or pair.time],
        "work": _work(run, verdicts),
        "steps": _steps(run),
        "dense_line": DENSE_LINE,
        "bar_height": TIMELINE_HEIGHT,
        "metrics": lines,
        "distribution": extra_tables(run, "distribution"),
        "vbench": extra_tables(run, "vbench"),
        "attention": attention_table(run),
        "speed": extra_tables(run, "speed"),
        "extractors": _extractors(run),
        "environment": _environment(run),
        "call": flat(run.settings.get("call") or {}),
        "samples": samples[:MOST_SAMPLES],
        "samples_left_out": max(len(samples) - MOST_SAMPLES, 0),
    }


def density_cubes(run: Run, verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """Density by step, layer and head of each configuration that recorded it."""
    found = []
    for position, verdict in enumerate(verdicts, 1):
        cube = density_cube(run.good(verdict.row.name))
        if cube is not None:
            found.append({"number": position, "name": verdict.row.name, **cube})
    return found
