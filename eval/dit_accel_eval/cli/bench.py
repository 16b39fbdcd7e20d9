"""``dit-accel bench``: speed alone, but never without the quality of the same clips."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from dit_accel_eval.cli.shared import check_writable, default_prompts, failing, pairs, parse_size, table

__all__ = ["bench_command"]


def bench_command(
    pipeline: Annotated[str, typer.Option(help="Folder or Hub name of a diffusers pipeline.")],
    method: Annotated[str, typer.Option(help="Name of a method, see `dit-accel methods`.")] = "auto",
    density: Annotated[float, typer.Option(help="Work of the whole run over dense work.")] = 0.5,
    prompt: Annotated[str | None, typer.Option(help="What to generate (default: the first of the prompts).")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Prompts, from which static methods are calibrated (default: prompts.txt of the pipeline)."),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Timed runs of each.")] = 5,
    warmup: Annotated[int, typer.Option(help="Runs of each before, not timed.")] = 1,
    steps: Annotated[int | None, typer.Option(help="Denoising steps (default: the pipeline's; 8 on a CPU).")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of a clip (default: the pipeline's; 17 on a CPU).")] = None,
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH (default: the pipeline's; 128x128 on a CPU).")] = None,
    guidance: Annotated[float | None, typer.Option(help="Scale of classifier-free guidance.")] = None,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    option: Annotated[
        list[str] | None,
        typer.Option("--set", help="KEY=VALUE for the method, such as warmup=0.1 or min_tokens=0."),
    ] = None,
    compile_blocks: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="Compile the transformer's blocks, for both (default: on a GPU)."),
    ] = None,
    dense_backend: Annotated[
        str | None, typer.Option(help="diffusers' name of the dense backend (default: the fastest of those that work).")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="Write everything measured to this JSON file.")] = None,
) -> None:
    """Time dense and accelerated runs by phase, with spread, memory, energy, and what the speed cost."""
    console = Console(soft_wrap=True, highlight=False)
    with failing():
        from dit_accel_eval.files import write_json
        from dit_accel_eval.runs.pipeline import load_pipeline, resolve_device
        from dit_accel_eval.speed import BenchOptions, bench

        first, others = _prompts(pipeline, prompt, prompts)
        place = resolve_device(device)
        options = BenchOptions(
            method=method,
            density=density,
            prompt=first,
            others=others,
            seed=seed,
            repeats=repeats,
            warmup=warmup,
            steps=steps,
            frames=frames,
            size=parse_size(size),
            guidance=guidance,
            options=pairs(option or [], "--set"),
            compile=place.type == "cuda" if compile_blocks is None else compile_blocks,
            dense_backend=dense_backend,
        )
        options.check()
        if out is not None:
            check_writable(out)  # before minutes are spent, not after
        result = bench(load_pipeline(pipeline, place, dtype), options, note=lambda text: console.print(text))
        if out is not None:
            write_json(out, result)
        print_bench(console, result)


def _prompts(pipeline: str, prompt: str | None, file: Path | None) -> tuple[str, list[str]]:
    """The prompt, and others for calibration; without a file the prompt must be given."""
    from dit_accel_eval.runs.prompts import read_prompts

    path = default_prompts(pipeline, file)
    known = read_prompts(path) if file is not None or path.is_file() or prompt is None else []
    first = prompt if prompt is not None else known[0]
    return first, [other for other in known if other != first]


def print_bench(console: Console, result: Mapping[str, Any]) -> None:
    """Print the table: median and quartiles, then quality, then where the limit is."""
    dense, fast = result["dense"], result["accelerated"]
    name = f"{result['method']}, {result['engine']['density']:.3f} of the dense work"
    shown = table("median (quartiles)", "", "dense", name, "dense / accelerated")
    for key, label in _LINES.items():
        one, two = dense.get(key), fast.get(key)
        if two is not None:
            ratio = f"{one['median'] / two['median']:.2f}" if one is not None else ""
            shown.add_row(label, _spread(one), _spread(two), ratio)
    if dense["peak_bytes"] is not None:
        shown.add_row("peak memory, MiB", *(f"{run['peak_bytes'] / 2**20:.0f}" for run in (dense, fast)), "")
    quality = result["quality"]
    shown.add_row("PSNR, dB", "", f"{quality['psnr']:.2f}", "")
    shown.add_row("SSIM", "", f"{quality['ssim']:.4f}", "")
    console.print(shown)
    console.print(f"baseline: {result['baseline']['name']}", markup=False)
    share = result["attention"]["share"]
    if share is not None:
        console.print(
            f"attention is {share:.0%} of dense denoising: at this work the loop could be "
            f"{result['attention']['ceiling']:.2f} times as fast at most"
        )
    console.print(f"energy: {result['energy']}", markup=False)


_LINES = {
    "encode_s": "encoding, s",
    "denoise_s": "denoising, s",
    "decode_s": "decoding, s",
    "whole_s": "whole run, s",
    "step_ms": "one step, ms",
    "plan_ms": "of it planning, ms",
    "energy_j": "energy, J",
}


def _spread(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return ""
    low, high = value["quartiles"]
    return f"{value['median']:.3f} ({low:.3f} to {high:.3f})"
