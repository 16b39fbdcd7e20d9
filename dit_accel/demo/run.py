"""The demo from beginning to end."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from dit_accel.api import Handle, calibrate, enabled
from dit_accel.demo.options import DemoOptions
from dit_accel.demo.pipeline import Session
from dit_accel.demo.report import SCHEMA_VERSION, print_result, write_clips, write_maps
from dit_accel.demo.watch import Sighting, Watcher, head_maps
from dit_accel.method import Method

__all__ = ["run_demo"]

#: Prompts that static methods are calibrated on, less the one that is generated.
_CALIBRATION_PROMPTS = ("red heart", "rocket", "butterfly")
_CALIBRATION_STEPS = {"cpu": 6, "cuda": 30}


def run_demo(options: DemoOptions, console: Console | None = None) -> dict[str, Any]:
    """Generate a clip dense and accelerated, write both with their difference, and print what was measured.

    Args:
        options: what to do.
        console: where to print.

    Returns:
        The content of ``result.json``.

    Raises:
        DemoError: if the options or the model do not fit.
        ValueError: what :func:`dit_accel.enable` raises.
    """
    console = console or Console()
    options.check()
    method = options.chosen()
    console.print(f"loading {options.model_folder()} on {options.resolved_device()}")
    session = Session.open(options, console)
    grid = session.grid
    tokens = grid[0] * grid[1] * grid[2]
    console.print(
        f'"{options.prompt}": {session.frames} frames, {tokens} tokens ({"x".join(map(str, grid))}), '
        f"{session.steps} steps, seed {options.seed}"
    )
    enable_options, calibration = _enable_options(session, method)
    not_timed = _rehearse(session, method, enable_options)
    dense = session.generate("dense")
    with enabled(session.pipe, method, **enable_options) as handle:
        fast, sightings = _watched(session, handle, method)
        stats = handle.stats()
    result = _result(session, method, dense, fast, stats)
    result["calibration"], result["not_timed"] = calibration, not_timed
    _write(session, result, dense, fast, sightings)
    print_result(console, result, options.out)
    return result


def _enable_options(session: Session, method: Method) -> tuple[dict[str, Any], str]:
    """Options for :func:`dit_accel.enable`, and what was calibrated, if anything."""
    options = session.options
    if not method.static:
        return {"run_density": None if method.is_dense else options.run_density}, ""
    prompts = [p for p in _CALIBRATION_PROMPTS if p != options.prompt][:2]
    steps = min(session.steps, _CALIBRATION_STEPS[session.device.type])
    text = f"calibrated on {len(prompts)} other prompts, {steps} steps each"
    session.console.print(f"method {method.name} is static: calibrating on {', '.join(prompts)}, {steps} steps, twice")
    plan = calibrate(session.pipe, prompts, method, num_inference_steps=steps, output_type="latent", **session.call)
    return {"plan": plan}, text


def _rehearse(session: Session, method: Method, enable_options: dict[str, Any]) -> str:
    """Take compilation and first calls out of the timing; what was taken out."""
    if session.device.type != "cuda":
        from dit_accel_kernels import choose_backend

        dtype, head = session.pipe.transformer.dtype, session.pipe.transformer.config.attention_head_dim
        choose_backend(
            device=session.device, dtype=dtype, head_dim=head, block_q=method.block_q, block_k=method.block_k
        )
        session.rehearse(1)
        return "after a warm-up step and the backend's self-test, which are not counted"
    session.rehearse(2)
    # Two steps cannot always reach a density over the run, and only the kernels matter here.
    with enabled(session.pipe, method, **{**enable_options, "run_density": None}):
        session.rehearse(2)
    return "after a warm-up run each, so that compilation is not counted"


def _watched(session: Session, handle: Handle, method: Method) -> tuple[Any, list[Sighting]]:
    run = next(iter(handle.runs.values()))
    with Watcher(run) as watcher:
        fast = session.generate(method.name)
    return fast, list(watcher.sightings.values())


def _result(session: Session, method: Method, dense: Any, fast: Any, stats: dict[str, Any]) -> dict[str, Any]:
    from dit_accel.env import gpus, versions
    from dit_accel_eval.metrics import paired

    options, status = session.options, next(iter(stats.values()))
    grid = session.grid
    return {
        "schema_version": SCHEMA_VERSION,
        "method": method.to_dict(),
        "backend": status.backend,
        "tokens": grid[0] * grid[1] * grid[2],
        "grid": list(grid),
        "settings": {
            "prompt": options.prompt,
            "seed": options.seed,
            "steps": session.steps,
            "frames": session.frames,
            "size": list(options.size),
            "guidance": options.guidance,
            "run_density": options.run_density,
            "device": str(session.device),
            "dtype": str(session.pipe.transformer.dtype).removeprefix("torch."),
            "model": str(options.model_folder()),
        },
        "density": {
            "run": status.density,
            "sparse": status.sparse_density,
            "calls": status.calls,
            "sparse_calls": status.sparse_calls,
            "dense_calls": status.reasons,
            "notes": status.notes,
            "by_step": {str(step): value for step, value in status.density_by_step.items()},
        },
        "quality": paired(fast.frames[0], dense.frames[0]).to_dict(),
        "seconds": {
            "dense": dense.denoise_seconds,
            "accelerated": fast.denoise_seconds,
            "planning": status.plan_ms / 1e3,
            "dense_decode": dense.decode_seconds,
            "accelerated_decode": fast.decode_seconds,
        },
        "speedup": dense.denoise_seconds / fast.denoise_seconds,
        "versions": versions(),
        "gpus": gpus(),
    }


def _write(session: Session, result: dict[str, Any], dense: Any, fast: Any, sightings: list[Sighting]) -> None:
    from dit_accel_eval.files import write_json

    options, files = session.options, []
    maps = head_maps(sightings)
    name = result["method"]["name"]
    if options.video:
        session.console.print("writing the clips")
        label = f"{name}, density {result['density']['run']:.2f}, {result['quality']['psnr']:.1f} dB"
        files += write_clips(options.out, dense.frames[0], fast.frames[0], label)
    files += write_maps(options.out, maps, name)
    result["heads"] = [one.to_dict() for one in maps]
    result["files"] = [*files, "result.json"]
    write_json(options.out / "result.json", result)
