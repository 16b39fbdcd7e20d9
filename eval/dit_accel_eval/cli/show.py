"""``dit-accel report`` and ``dit-accel inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from dit_accel_eval.cli.shared import default_prompts, failing, numbers, pairs, parse_size, words

__all__ = ["inspect_command", "report_command", "write_all"]


def write_all(folder: Path, max_bytes: int | None = None, title: str | None = None) -> list[Path]:
    """Write the report and the summary of a run; the files."""
    from dit_accel_eval.report import write_report, write_summary

    more: dict[str, Any] = {} if max_bytes is None else {"max_bytes": max_bytes}
    return [write_report(folder, title=title, **more), write_summary(folder)]


def report_command(
    folder: Annotated[Path, typer.Argument(help="Folder of a run of `dit-accel eval`.")],
    max_megabytes: Annotated[float, typer.Option(help="Size that report.html does not exceed.")] = 15.0,
    title: Annotated[str | None, typer.Option(help="Headline.")] = None,
) -> None:
    """Write report.html and summary.md of a run, finished or not."""
    with failing():
        for path in write_all(folder, round(max_megabytes * 1e6), title):
            Console(soft_wrap=True, highlight=False).print(str(path), markup=False)


def inspect_command(
    pipeline: Annotated[str, typer.Option(help="Folder or Hub name of a diffusers pipeline.")],
    prompt: Annotated[
        str | None, typer.Option(help="What to generate (default: the first of the pipeline's prompts.txt).")
    ] = None,
    method: Annotated[str, typer.Option(help="Methods between commas; dense shows attention without a plan.")] = "auto",
    layers: Annotated[str | None, typer.Option(help="Layers between commas (default: four, evenly spread).")] = None,
    heads: Annotated[str | None, typer.Option(help="Heads between commas (default: four, evenly spread).")] = None,
    steps_seen: Annotated[
        str | None, typer.Option("--at", help="Steps to look at (default: first, middle and last).")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Query tokens to sample.")] = 64,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of the clip.")] = None,
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH in pixels.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Scale of classifier-free guidance.")] = None,
    call: Annotated[list[str] | None, typer.Option(help="KEY=VALUE for the pipeline call.")] = None,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    out: Annotated[Path, typer.Option(help="Folder for the capture and its page.")] = Path("inspect"),
) -> None:
    """Capture real attention of some layers, heads and steps, and write a page to look at it."""
    console = Console(soft_wrap=True, highlight=False)
    with failing():
        from dit_accel_eval.runs.pipeline import call_arguments, load_pipeline, resolve_device

        pipe = load_pipeline(pipeline, resolve_device(device), dtype)
        arguments = call_arguments(
            pipe,
            steps=steps,
            frames=frames,
            size=parse_size(size),
            guidance=guidance,
            more=pairs(call or [], "--call"),
        )
        chosen: dict[str, Any] = {
            "layers": _places(layers, "--layers"),
            "heads": _places(heads, "--heads"),
            "steps": _places(steps_seen, "--at"),
            "methods": words(method),
        }
        text = prompt if prompt is not None else _first_prompt(pipeline)
        for path in _capture(pipe, text, out, {**chosen, "tokens": tokens, "seed": seed, **arguments}):
            console.print(str(path), markup=False)


def _places(text: str | None, what: str) -> list[int] | None:
    return None if text is None else numbers(text, int, what)


def _first_prompt(pipeline: str) -> str:
    from dit_accel_eval.runs.prompts import read_prompts

    return read_prompts(default_prompts(pipeline, None))[0]


def _capture(pipe: Any, prompt: str, out: Path, options: dict[str, Any]) -> list[Path]:
    from dit_accel_eval.inspect import capture, write_viewer

    out.mkdir(parents=True, exist_ok=True)
    found = capture(pipe, prompt, **options)
    return [found.save(out), write_viewer(found, out / "inspect.html")]
