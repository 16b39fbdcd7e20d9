"""Writing the report as one HTML file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dit_accel_eval.files import write_text
from dit_accel_eval.report.context import build_context, density_cubes
from dit_accel_eval.report.folder import Run, number, read_run
from dit_accel_eval.report.page import render
from dit_accel_eval.report.sprites import Gallery, gallery
from dit_accel_eval.report.verdict import METRIC, Verdict

__all__ = ["write_report"]

_STYLES = ("report/static/base.css", "report/static/report.css")
_SCRIPTS = tuple(f"report/static/{name}.js" for name in ("common", "player", "density", "report"))
_MIN_BYTES = 300_000
_PER_SHEET = 260  # bytes of markup and description around a picture
_FPS = 16


def write_report(
    folder: str | Path,
    *,
    max_bytes: int = 15_000_000,
    title: str | None = None,
    on_clip: Callable[[], None] = lambda: None,
) -> Path:
    """Write ``report.html`` into the folder of a run.

    The file needs nothing else: clips, charts, style and script are inside, and its policy forbids every request. A run
    that is not finished gives a report that says what is missing.

    Args:
        folder: of a run, with ``run.json``.
        max_bytes: size of the file that is not exceeded; clips are made smaller, and then fewer, until it fits, and
            the report says so.
        title: headline.
        on_clip: called after each clip that was encoded, for a progress bar.

    Returns:
        The file.

    Raises:
        FileNotFoundError: no folder of a run.
        ValueError: ``max_bytes`` is too small for a report without clips, or ``run.json`` is broken.
        OSError: the folder cannot be written to.
    """
    if max_bytes < _MIN_BYTES:
        raise ValueError(f"max_bytes must be at least {_MIN_BYTES} for a report, got {max_bytes}")
    run = read_run(folder)
    context = build_context(run, title)
    verdicts: list[Verdict] = context["verdicts"]
    keys = [key for key, _ in context["worst"]]
    cubes = density_cubes(run, verdicts)
    bare = _page(run, context, cubes, Gallery({}, None, 0, "", ()))
    budget = max_bytes - len(bare.encode()) - _PER_SHEET * len(keys) * len(run.rows)
    if budget < 0:
        raise ValueError(f"max_bytes must be at least {len(bare.encode()) + 100_000} for this run, got {max_bytes}")
    shown = gallery(run, keys, budget, max_bytes, on_clip)
    html = _page(run, context, cubes, shown)
    path = Path(folder) / "report.html"
    write_text(path, html)
    return path


def _fps(run: Run) -> float:
    asked = number((run.settings.get("call") or {}).get("fps"))
    return asked if asked is not None and asked > 0 else _FPS


def _page(run: Run, context: Mapping[str, Any], cubes: Sequence[Mapping[str, Any]], shown: Gallery) -> str:
    # Numbers of the configurations are those of the verdicts, wherever they appear.
    numbers = {verdict.row.name: i for i, verdict in enumerate(context["verdicts"], 1)}
    sheets = list(shown.sheets.items())
    data = {
        "rows": [
            {
                "name": row.name,
                "number": numbers.get(row.name, 0),
                "floor": row.floor,
                "dense": not row.accelerated and not row.floor,
            }
            for row in run.rows
        ],
        "prompts": _prompts(run, context, shown),
        "sheets": [{"name": n, "index": i, "seed": s, **sheet.to_dict()} for (n, i, s), sheet in sheets],
        "cubes": cubes,
        "fps": _fps(run),
    }
    return render(
        "report/templates/report.html.j2",
        styles=_STYLES,
        scripts=_SCRIPTS,
        **context,
        data=data,
        pictures=[sheet.data for _, sheet in sheets],
        gallery=shown,
        numbers=numbers,
        remarks=[*context["run"].problems, *shown.problems],
        metric=METRIC,
    )


def _prompts(run: Run, context: Mapping[str, Any], shown: Gallery) -> list[dict[str, Any]]:
    """Prompts with clips, the worst first, with the PSNR of each configuration."""
    with_clips = {(index, seed) for _, index, seed in shown.sheets}
    found = []
    for key, lowest in context["worst"]:
        if key in with_clips:
            values = {
                sample.name: sample.metrics.get(METRIC)
                for row in run.rows
                for sample in run.good(row.name)
                if sample.key == key
            }
            found.append(
                {"index": key[0], "seed": key[1], "text": run.prompt(key[0]), "worst": lowest, "values": values}
            )
    return found
