"""The command line: ``dit-accel demo``, ``calibrate``, ``methods``, ``models``, ``env``, ``tune``; others register."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

__all__ = ["app", "main"]

app = typer.Typer(
    help="Sparse attention for diffusion transformers: one line, measured quality.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_JSON = typer.Option(False, "--json", help="Print JSON instead of a table.")


def main() -> None:
    """Entry point of the ``dit-accel`` command."""
    app()


def _version(value: bool) -> None:
    if value:
        from dit_accel._version import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def _fail(message: object) -> typer.Exit:
    """Say one line on standard error and leave with code 2."""
    if isinstance(message, OSError) and message.filename is not None:
        message = f"{message.filename}: {message.strerror}"
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {message}", markup=False, style="red")
    return typer.Exit(2)


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=2, ensure_ascii=False))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, no_wrap=index == 0)
    return table


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdigit() and width.isdigit()):
        raise _fail(f"size must be HEIGHTxWIDTH in pixels, such as 128x128, got {text!r}")
    return int(height), int(width)


@app.command()
def demo(
    method: str = typer.Option("auto", help="Name of a method, see `dit-accel methods`."),
    density: float | None = typer.Option(
        None, help="Share of blocks computed on a sparse step (default: the method's own)."
    ),
    run_density: float | None = typer.Option(
        None, help="Work of the whole run over that of a dense run, instead of --density."
    ),
    prompt: str = typer.Option("octopus", help="What to generate."),
    steps: int | None = typer.Option(None, help="Denoising steps (default: 12 on a CPU, 30 on a GPU)."),
    seed: int = typer.Option(0, help="Seed of the noise."),
    frames: int | None = typer.Option(None, help="Frames of the clip (default: 33 on a CPU, 65 on a GPU)."),
    guidance: float = typer.Option(4.0, help="Scale of classifier-free guidance."),
    size: str = typer.Option("128x128", help="HEIGHTxWIDTH in pixels."),
    out: Path = typer.Option(Path("demo"), help="Folder to write to."),
    device: str = typer.Option("auto", help="auto, cpu or cuda."),
    model: Path | None = typer.Option(None, help="Folder of a diffusers video pipeline (default: examples/tiny_wan)."),
    no_video: bool = typer.Option(False, "--no-video", help="Write no clips."),
) -> None:
    """Generate one clip dense and accelerated, and show both with their difference, density and time."""
    from dit_accel.demo import DemoOptions, run_demo

    options = DemoOptions(
        method=method,
        density=density,
        run_density=run_density,
        prompt=prompt,
        steps=steps,
        seed=seed,
        frames=frames,
        guidance=guidance,
        size=_size(size),
        out=out,
        device=device,
        model=model,
        video=not no_video,
    )
    try:
        run_demo(options)
    except ValueError as error:  # DemoError, and what dit_accel.enable says of its options
        raise _fail(error) from None


@app.command()
def calibrate(
    model: Path = typer.Argument(..., help="Folder of a diffusers pipeline, or its name on the Hub."),
    target: str = typer.Option(..., help="psnr:35 in dB, error:0.05, density:0.3, or high, balanced, fast."),
    prompts: Path = typer.Option(..., help="Text file, one prompt a line."),
    out: Path = typer.Option(Path("profile"), help="Folder, or file ending in .json, to write the profile to."),
    method: str | None = typer.Option(
        None, help="Name of a method (default: auto); paro and other static ones take --target density:0.3."
    ),
    control: str = typer.Option("density", help="density: each head gets one; error: it is kept while plans are made."),
    errors: str = typer.Option("", help="Further errors whose PSNR is measured, such as 0.1,0.03."),
    count: int | None = typer.Option(None, help="How many of the prompts to use (default: all)."),
    steps: int | None = typer.Option(None, help="Denoising steps (default: the pipeline's; 8 on a CPU)."),
    frames: int | None = typer.Option(None, help="Frames of a clip (default: the pipeline's; 17 on a CPU)."),
    size: str | None = typer.Option(
        None, help="HEIGHTxWIDTH, such as 480x832 (default: the pipeline's; 128x128 on a CPU)."
    ),
    guidance: float | None = typer.Option(None, help="Scale of classifier-free guidance (default: the pipeline's)."),
    seed: int = typer.Option(0, help="Seed of the first prompt's noise."),
    work: Path | None = typer.Option(None, help="Folder that keeps what is done; a stopped calibration goes on there."),
    device: str = typer.Option("auto", help="auto, cpu or cuda."),
) -> None:
    """Find out what a pipeline's attention needs for a target, and write a profile for `enable(pipe, profile=...)`."""
    from dit_accel.calibration.command import calibrate_command

    try:
        from dit_accel_eval.runs.pipeline import call_arguments, load_pipeline, resolve_device
        from dit_accel_eval.runs.prompts import read_prompts

        lines = read_prompts(prompts)[:count]
        pipe = load_pipeline(model, resolve_device(device))
        shape = None if size is None else _size(size)
        call = call_arguments(pipe, steps=steps, frames=frames, size=shape, guidance=guidance)
        further = [float(part) for part in errors.split(",") if part.strip()]
        options = {"control": control, "errors": further, "seed": seed, **call}
        calibrate_command(pipe, lines, method, target, out, work, options)
    except (ValueError, OSError) as error:
        raise _fail(error) from None


@app.command()
def methods(
    name: str | None = typer.Argument(None, help="Print every slot of this method."), as_json: bool = _JSON
) -> None:
    """List the methods with their slots and papers."""
    import dit_accel
    from dit_accel.presets import get_method

    if name is None:
        found = dit_accel.methods()
    else:
        try:
            found = [get_method(name)]
        except ValueError as error:
            raise _fail(error) from None
    if as_json:
        _print_json([method.to_dict() for method in found])
        return
    if name is not None:
        print(found[0].describe())
        return
    table = _table("methods", "name", "paper", "order · score · selection · remainder", "what it is")
    for method in found:
        order = method.order[0] if len(method.order) == 1 else f"best of {len(method.order)}"
        chosen = "its pattern" if method.is_geometric else method.select
        share = "" if method.density is None else f" at {method.density}"
        slots = f"{order} · {method.score} · {chosen}{share} · {method.compensate}"
        table.add_row(method.name, method.paper or "", slots, method.summary)
    console = Console()
    console.print(table)
    console.print("auto is the default; `dit-accel methods NAME` prints one in full.", markup=False, highlight=False)


@app.command()
def models(as_json: bool = _JSON) -> None:
    """List the transformer classes that can be accelerated."""
    import dit_accel

    rows = dit_accel.supported_models()
    if as_json:
        _print_json(rows)
        return
    if not rows:
        raise _fail("no integration could be loaded; install dit-accel[diffusers]")
    table = _table("models", "model", "family", "task", "tokens", "note")
    for _, group in itertools.groupby(rows, key=lambda row: row["family"]):
        classes = list(group)
        row = classes[0]  # classes of a family differ in their names alone
        sizes = [
            f"{s['name']}: {math.prod(s['grid']):,}" + (f" + {s['extra']:,}" if s["extra"] else "")
            for s in row.get("sizes", ())
        ]
        names = ["any other class" if one["model"] == "ModelMixin" else one["model"] for one in classes]
        table.add_row("\n".join(names), row["family"], row["task"], "\n".join(sizes), row["note"])
    console = Console()
    console.print(table)
    console.print("tokens: those of the picture or clip, + others such as text", markup=False, highlight=False)


@app.command()
def env(as_json: bool = _JSON) -> None:
    """Show versions, GPUs, and each backend with the reason why it is usable or not."""
    from dit_accel.env import collect

    data = collect()
    if as_json:
        _print_json(data)
        return
    console = Console()
    table = _table("environment", "what", "value")
    table.add_row("python", f"{data['python']} on {data['platform']}")
    for package, version in data["versions"].items():
        table.add_row(package, version or "not installed")
    table.add_row("cuda / hip", f"{data['cuda'] or 'none'} / {data['hip'] or 'none'}")
    for gpu in data["gpus"]:
        table.add_row(f"gpu {gpu['index']}", f"{gpu['name']}, {gpu['memory_gib']} GiB, sm {gpu['capability']}")
    if not data["gpus"]:
        none = "none that torch sees" if data["cuda"] or data["hip"] else "none: this torch is built for CPUs alone"
        table.add_row("gpu", f"{none}; {data['cpu']['threads']} CPU threads")
    settled = data["settled_calls"]
    table.add_row("settled calls", "without Python" if settled["in_c"] else f"by Python: {settled['reason']}")
    for variable, value in data["variables"].items():
        table.add_row(variable, value)
    console.print(table)
    table = _table("backends", "name", "usable", "why")
    for row in data["backends"]:
        why = row["reason"] or f"equals the reference ({row['tested']}){', the choice of auto' * row['automatic']}"
        table.add_row(row["name"], "yes" if row["usable"] else "no", why)
    console.print(table)


@app.command()
def tune(
    head_dim: list[int] = typer.Option([64, 128], help="Columns of a head; give it again for more."),
    blocks: list[str] = typer.Option(["64x64", "128x64", "128x128"], help="Queries x keys of a block."),
    dtype: str = typer.Option("bfloat16", help="bfloat16, float16 or float32."),
    tokens: int = typer.Option(8192, help="Length of the sequence to measure with."),
    heads: int = typer.Option(8, help="Heads to measure with."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Measure, but write nothing."),
    as_json: bool = _JSON,
) -> None:
    """Measure tile shapes of the Triton kernel on this GPU and keep the faster ones; some minutes, mostly compiling."""
    from dit_accel_kernels.tune.command import tune_command

    try:
        outcomes, path = tune_command(
            head_dim, blocks, dtype, dry_run=dry_run, say=None if as_json else print, tokens=tokens, heads=heads
        )
    except (ValueError, RuntimeError, OSError) as error:
        raise _fail(error) from None
    if as_json:
        _print_json({"file": None if dry_run else str(path), "cases": outcomes})
        return
    table = _table("tiles", "case", "shipped, ms", "best, ms", "gain", "shape", "tried / failed")
    for row in outcomes:
        gain = f"{row['gain']:.2f} ×" if row["gain"] > 1 else "none"
        counts = f"{row['tried']} / {row['failed']}"
        table.add_row(row["case"], f"{row['default_ms']:.3f}", f"{row['best_ms']:.3f}", gain, row["shape"], counts)
    Console().print(table)
    print("nothing written (--dry-run)" if dry_run else f"written to {path}")


def _register_all() -> None:
    """Commands that live beside what they show; those of the evaluation come with its package."""
    from dit_accel.simulator.cli import register

    register(app)
    try:
        from dit_accel_eval.cli import register as register_eval
    except ImportError:  # a wheel without the evaluation package
        return
    register_eval(app)


_register_all()
