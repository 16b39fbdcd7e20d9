"""``dit-accel eval`` and ``dit-accel eval setup``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from dit_accel_eval.cli.shared import default_prompts, failing, numbers, pairs, parse_size, print_error, words

if TYPE_CHECKING:
    from dit_accel_eval.runs import EvalOptions

__all__ = ["eval_app"]

eval_app = typer.Typer(
    help="Compare dense and accelerated runs of a pipeline over prompts; stopped runs go on where they were.",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
)


@eval_app.callback()
def evaluate_command(
    context: typer.Context,
    pipeline: Annotated[str | None, typer.Option(help="Folder or Hub name of a diffusers pipeline.")] = None,
    method: Annotated[str, typer.Option(help="Methods between commas, see `dit-accel methods`.")] = "auto",
    density: Annotated[str, typer.Option(help="Work of the whole run over dense work, between commas.")] = "0.5",
    prompts: Annotated[
        Path | None,
        typer.Option(help="One prompt a line, or JSON such as VBench's list (default: prompts.txt of the pipeline)."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps (default: the pipeline's; 8 on a CPU).")] = None,
    seeds: Annotated[str, typer.Option(help="Each prompt is generated with each of these seeds.")] = "0",
    frames: Annotated[int | None, typer.Option(help="Frames of a clip (default: the pipeline's; 17 on a CPU).")] = None,
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH (default: the pipeline's; 128x128 on a CPU).")] = None,
    guidance: Annotated[float | None, typer.Option(help="Scale of classifier-free guidance.")] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            help="Presets (standard, quick, svg, teacache), names, fid, kid, is, clip_score, fvd, vbench, "
            "vbench:DIMENSION, between commas (default: standard, on a CPU quick; less what is missing here)."
        ),
    ] = None,
    profile: Annotated[str, typer.Option(help="Extractors: offline or official.")] = "offline",
    out: Annotated[Path, typer.Option(help="Folder of the run; all processes must share it.")] = Path("eval-run"),
    limit: Annotated[int | None, typer.Option(help="Take so many prompts.")] = None,
    calibration_prompts: Annotated[
        Path | None,
        typer.Option(help="Prompts for static methods (default: the two behind --limit)."),
    ] = None,
    batch: Annotated[int, typer.Option(help="Prompts in one pipeline call.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads (default: torch's choice).")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--set", help="KEY=VALUE for all methods, such as warmup=0.1 or min_tokens=0."),
    ] = None,
    call: Annotated[
        list[str] | None,
        typer.Option(help="KEY=VALUE for the pipeline call, such as negative_prompt=blurry."),
    ] = None,
    floor: Annotated[bool, typer.Option(help="Also run dense with another seed, which unrelated clips score.")] = True,
    attention: Annotated[bool, typer.Option(help="Also compare attention outputs, on the first prompt.")] = True,
    report: Annotated[bool, typer.Option(help="Write report.html and summary.md at the end.")] = True,
    retry_errors: Annotated[bool, typer.Option("--retry-errors", help="Make samples that failed again.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run.")] = False,
    probe: Annotated[bool, typer.Option("--probe", help="With --dry-run: measure two dense steps.")] = False,
) -> None:
    """Compare dense and accelerated runs of a pipeline over prompts; stopped runs go on where they were."""
    if context.invoked_subcommand is not None:
        return
    with failing(f"stopped; finished samples are kept in {out}, and the same command goes on"):
        from dit_accel_eval.runs import EvalOptions
        from dit_accel_eval.runs.prompts import read_prompts

        if pipeline is None:
            raise ValueError("--pipeline is needed: the folder or the Hub name of a diffusers pipeline")
        options = EvalOptions(
            methods=words(method) or [],
            densities=numbers(density, float, "--density"),
            options=pairs(option or [], "--set"),
            seeds=numbers(seeds, int, "--seeds"),
            steps=steps,
            frames=frames,
            size=parse_size(size),
            guidance=guidance,
            call=pairs(call or [], "--call"),
            metrics=words(metrics),
            profile=profile,
            calibration=None if calibration_prompts is None else read_prompts(calibration_prompts),
            limit=limit,
            batch=batch,
            floor=floor,
            attention=attention,
            device=device,
            dtype=dtype,
            threads=threads,
            retry_errors=retry_errors,
            command=shlex.join(["dit-accel", *sys.argv[1:]]),
        )
        _evaluate(pipeline, default_prompts(pipeline, prompts), out, options, report, probe if dry_run else None)


def _evaluate(pipeline: str, prompts: Path, out: Path, options: EvalOptions, report: bool, dry: bool | None) -> None:
    """Run it; ``dry`` is whether to probe on a dry run, ``None`` on a real one."""
    from dit_accel_eval.cli.progress import ProgressObserver
    from dit_accel_eval.runs import Ranks, evaluate

    ranks = Ranks.from_env()
    console = Console(quiet=ranks.rank != 0)
    if dry is not None:
        from dit_accel_eval.cli.dry_run import dry_run

        dry_run(console, pipeline, prompts, out, options, probe=dry)
        return
    _warn(console, options)
    with ProgressObserver(console) as observer:
        results = evaluate(pipeline, prompts, out, options, ranks=ranks, observer=observer)
    if results is not None:
        _finish(console, out, results, report)


def _warn(console: Console, options: EvalOptions) -> None:
    """What can be foreseen without the model.

    Raises:
        ValueError: if no configuration can run, so that dense clips would be made for nothing.
    """
    from dit_accel_eval.runs.rows import why_unreachable

    reasons = {row.name: why_unreachable(row, options.steps) for row in options.rows() if row.method is not None}
    failing_rows = {name: reason for name, reason in reasons.items() if reason is not None}
    if failing_rows and len(failing_rows) == len(reasons):
        raise ValueError("nothing can run: " + "; ".join(f"{name}: {reason}" for name, reason in failing_rows.items()))
    for name, reason in failing_rows.items():
        console.print(f"{name} will fail: {reason}", markup=False, style="yellow", soft_wrap=True)


def _finish(console: Console, out: Path, results: dict[str, Any], report: bool) -> None:
    from dit_accel_eval.cli.results import failures, print_results
    from dit_accel_eval.cli.show import write_all

    print_results(console, results)
    console.print(f"results: {out / 'results.json'}", markup=False, soft_wrap=True)
    if report:
        for path in write_all(out):
            console.print(f"report: {path}", markup=False, soft_wrap=True)
    failed = failures(results, out)
    if failed is not None:
        print_error(failed)
        raise typer.Exit(2)


@eval_app.command("setup")
def setup_command(
    names: Annotated[list[str] | None, typer.Argument(help="Extractors (default: all of them).")] = None,
) -> None:
    """Fetch the pinned extractors that metrics look through, check their SHA-256 and keep them for offline use."""
    console = Console(soft_wrap=True, highlight=False)
    with failing():
        from dit_accel_eval.extractors import cache_dir, setup

        setup(names or None, progress=lambda text: console.print(text, markup=False))
        console.print(f"extractors are in {cache_dir()}", markup=False)
