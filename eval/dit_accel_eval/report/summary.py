"""The same findings as a page of Markdown, for a pull request or a model card."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dit_accel_eval.files import write_text
from dit_accel_eval.report.context import build_context
from dit_accel_eval.report.folder import read_run
from dit_accel_eval.report.tables import MetricLine
from dit_accel_eval.report.verdict import Verdict

__all__ = ["write_summary"]

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~])")


def _plain(text: object) -> str:
    """Text that Markdown and HTML show as it is, on one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(str(text).split())).replace("&", "&amp;").replace("\\<", "&lt;")


def _value(value: float | None, digits: str = ".2f") -> str:
    return "–" if value is None else format(value, digits)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def _verdict_row(verdict: Verdict) -> list[str]:
    worst = verdict.worst
    floor = {True: "yes", False: f"no: {verdict.above_floor} of {verdict.judged}", None: "no floor"}[
        verdict.clears_floor
    ]
    return [
        _plain(verdict.row.name),
        f"{verdict.samples} of {verdict.planned}",
        _value(verdict.work, ".3f"),
        _value(verdict.speedup),
        _value(verdict.psnr),
        "–" if worst is None else f"{_plain(worst.prompt)} ({_value(worst.metrics['psnr'])})",
        floor,
    ]


def _metric_rows(lines: Sequence[MetricLine], names: Sequence[str]) -> list[list[str]]:
    rows = []
    for line in lines:
        about = line.description
        better = ("higher" if about.higher_is_better else "lower") if about.known else "not listed here"
        cells = [_value(line.cells[name].mean, ".4g") if name in line.cells else "–" for name in names]
        rows.append(
            [_plain(about.name), better, _plain(about.extractor or "none"), _plain(about.convention or "–"), *cells]
        )
    return rows


def _fenced(command: object) -> list[str]:
    """A code block whose fence is longer than any run of backticks inside."""
    text = str(command)
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return [fence + "text", text, fence]


def _state(context: Mapping[str, Any]) -> list[str]:
    state, run = context["state"], context["run"]
    if state["finished"] and not run.problems:
        return []
    lines = ["", f"**{state['title']}: {state['made']} of {state['planned']} samples were made.**", ""]
    lines += [f"- {_plain(name)}: {len(keys)} samples missing" for name, keys in state["missing"].items()]
    lines += [
        f"- {_plain(f['name'])}: {f['count']} samples failed: {_plain(f['error'])}" for f in state["failures"][:20]
    ]
    lines += [f"- {_plain(problem)}" for problem in run.problems]
    return lines


def write_summary(folder: str | Path) -> Path:
    """Write ``summary.md`` into the folder of a run.

    Args:
        folder: of a run, with ``run.json``.

    Returns:
        The file.

    Raises:
        FileNotFoundError: no folder of a run.
        ValueError: ``run.json`` is broken.
        OSError: the folder cannot be written to.
    """
    run = read_run(folder)
    context = build_context(run)
    verdicts: list[Verdict] = context["verdicts"]
    lines = [f"# {_plain(context['title'])}", ""]
    lines += [f"- **{_plain(v.row.name)}**: {_plain(v.sentence)}" for v in verdicts] or ["No method was compared."]
    lines += _state(context)
    head = ["configuration", "samples", "work", "speed", "PSNR, dB", "worst prompt (dB)", "clears the floor"]
    lines += ["", "## Verdict", "", *_table(head, [_verdict_row(v) for v in verdicts])]
    floor = context["floor"]
    lines += [
        "",
        "Work is attention work of the whole run over that of a dense run, planning included; speed is dense denoising "
        "time over its own.",
        "The floor is dense attention with another seed: "
        + (f"{floor:.2f} dB PSNR on average." if floor is not None else "it was not run."),
    ]
    names = [row.name for row in run.rows if row.name != "dense"]
    head = ["metric", "better", "extractor", "convention", *map(_plain, names)]
    lines += ["", "## Metrics", "", *_table(head, _metric_rows(context["metrics"], names))]
    for title, key in (("Distribution", "distribution"), ("VBench dimensions", "vbench")):
        if context[key]:
            cells = [[_plain(k), *(_plain(v.get(n, "–")) for n in ["dense", *names])] for k, v in context[key].items()]
            lines += ["", f"## {title}", "", *_table(["value", "dense", *map(_plain, names)], cells)]
    lines += ["", "## Command", "", *_fenced(run.settings.get("command", "not recorded")), ""]
    path = Path(folder) / "summary.md"
    write_text(path, "\n".join(lines))
    return path
