"""``dit-accel eval --dry-run``: what will run, and what it takes as far as that was measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from dit_accel_eval.cli.shared import table
from dit_accel_eval.compare import Configuration
from dit_accel_eval.runs import EvalOptions
from dit_accel_eval.runs.estimate import Estimate, estimate_from_probe, estimate_from_records
from dit_accel_eval.runs.folder import RunFolder
from dit_accel_eval.runs.options import read_run_settings
from dit_accel_eval.runs.pipeline import load_pipeline, resolve_device
from dit_accel_eval.runs.quality import choose_metrics
from dit_accel_eval.runs.rows import is_static, why_unreachable
from dit_accel_eval.runs.settings import RunSettings

__all__ = ["dry_run"]


def dry_run(console: Console, pipeline: str, prompts: Path, out: Path, options: EvalOptions, *, probe: bool) -> None:
    """Print what would run, without running it.

    Args:
        console: where to.
        pipeline: folder or name.
        prompts: file.
        out: folder of the run, which need not exist.
        options: of the run.
        probe: whether to load the pipeline and measure two dense steps.

    Raises:
        EvalError: what an evaluation would refuse, too.
    """
    chosen, calibration = options.prompts(prompts)
    known = read_run_settings(out)
    rows = options.rows()
    steps = options.steps if options.steps is not None or known is None else known.steps
    _print_rows(console, rows, steps)
    metrics = (
        choose_metrics(options.metrics, options.profile) if known is None or options.metrics is not None else known
    )
    left_out: Any = getattr(metrics, "left_out", {})
    names = metrics.paired if hasattr(metrics, "paired") else metrics.metrics
    console.print(f"metrics: {', '.join([*names, *metrics.distribution, *metrics.vbench])}", soft_wrap=True)
    for name, reason in left_out.items():
        console.print(f"left out: {name}: {reason}", markup=False, soft_wrap=True)
    clips = len(chosen) * len(options.seeds) * (len(rows) + 1)
    console.print(
        f"{len(chosen)} prompts x {len(options.seeds)} seeds x {len(rows) + 1} configurations, dense included: "
        f"{clips} clips to {out}",
        soft_wrap=True,
    )
    if calibration:
        console.print(f"calibration, two dense runs each, on: {', '.join(calibration)}", markup=False, soft_wrap=True)
    _print_estimate(console, _estimate(pipeline, prompts, out, options, known, clips, probe))


def _print_rows(console: Console, rows: Sequence[Configuration], steps: int | None) -> None:
    shown = table("configurations", "name", "method", "options", "remark")
    shown.add_row("dense", "", "", "the baseline")
    for row in rows:
        remark = why_unreachable(row, steps) or ("is calibrated first" if is_static(row) else "")
        if row.method is None:
            remark = f"dense, seeds + {row.seed_offset}: how far apart unrelated clips are"
        shown.add_row(row.name, row.method or "", ", ".join(f"{k}={v}" for k, v in row.options.items()), remark)
    console.print(shown)


def _estimate(
    pipeline: str, prompts: Path, out: Path, options: EvalOptions, known: RunSettings | None, clips: int, probe: bool
) -> Estimate:
    if known is not None:
        folder = RunFolder(out, [row.name for row in known.all_rows])
        if not probe:
            return estimate_from_records(known, folder)
        clips = len(folder.missing(known))
    if not probe:
        return Estimate(clips, None, None, "nothing was measured yet; --probe loads the pipeline and runs two steps")
    pipe = load_pipeline(pipeline, resolve_device(options.device), options.dtype)
    return estimate_from_probe(pipe, options.settings(pipe, pipeline, prompts, known), clips)


def _print_estimate(console: Console, estimate: Estimate) -> None:
    time = "unknown" if estimate.seconds is None else _duration(estimate.seconds)
    disk = "unknown" if estimate.bytes is None else f"{estimate.bytes / 2**20:.1f} MiB"
    console.print(
        f"still to make: {estimate.samples} clips; time on one process {time}, without metrics; disk {disk}\n"
        f"(from: {estimate.basis})",
        soft_wrap=True,
        highlight=False,
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
