"""An evaluation from beginning to end, resumable at any moment and spread over processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import dit_accel
from dit_accel_eval.compare import Configuration
from dit_accel_eval.generate import generate
from dit_accel_eval.runs.attention_probe import probe_attention
from dit_accel_eval.runs.calibrate import calibrate_rows, enable_options, needs_calibration
from dit_accel_eval.runs.errors import EvalError, writing
from dit_accel_eval.runs.folder import RunFolder
from dit_accel_eval.runs.observer import Observer
from dit_accel_eval.runs.options import EvalOptions, read_run_settings
from dit_accel_eval.runs.pipeline import load_pipeline, resolve_device
from dit_accel_eval.runs.ranks import Ranks
from dit_accel_eval.runs.sample import Maker
from dit_accel_eval.runs.settings import RunSettings
from dit_accel_eval.runs.summary import summarise_run

__all__ = ["evaluate"]

_REHEARSAL = {"cpu": 1, "cuda": 2}


def evaluate(
    pipeline: Any,
    prompts: Sequence[str] | str | Path,
    out: str | Path,
    options: EvalOptions | None = None,
    *,
    ranks: Ranks | None = None,
    observer: Observer | None = None,
) -> dict[str, Any] | None:
    """Compare dense and accelerated runs of a pipeline, and write the results to a folder.

    A run that was stopped goes on where it was: finished samples are neither made again nor lost, and the results are
    those of a run that was not stopped. Under ``torchrun`` or ``accelerate launch`` the samples are spread over the
    processes, which must share ``out``.

    Args:
        pipeline: folder or name of a diffusers pipeline, or the pipeline.
        prompts: what to generate, or a file, see :func:`dit_accel_eval.runs.prompts.read_prompts`.
        out: folder; docs/evaluate.md says what lies in it.
        options: see :class:`EvalOptions`.
        ranks: which process this is; read from the environment by default.
        observer: is told how it goes.

    Returns:
        What ``results.json`` holds, or ``None`` on any process but the first.

    Raises:
        EvalError: bad options, another run with other settings in ``out``, a full disk, or dense attention that cannot
            run. What is finished is kept.
    """
    options = options or EvalOptions()
    ranks = ranks or Ranks.from_env()
    observer = observer or Observer()
    out = Path(out)
    options.prompts(prompts)  # what is wrong with them is said before anything slow begins
    name = pipeline if isinstance(pipeline, str | Path) else None
    pipe = pipeline if name is None else load_pipeline(name, resolve_device(options.device, ranks.local), options.dtype)
    known = read_run_settings(out)
    settings = options.settings(pipe, name, prompts, known)
    folder = RunFolder(out, [row.name for row in settings.all_rows], ranks.rank)
    folder.open()
    ranks.begin(out)
    try:
        settings = _agree(settings, folder, ranks)
        return _run(pipe, settings, folder, ranks, observer, options.retry_errors)
    except BaseException as error:
        ranks.failed(out, error)
        raise
    finally:
        folder.close()


def _agree(settings: RunSettings, folder: RunFolder, ranks: Ranks) -> RunSettings:
    """Write ``run.json``, or check that the one that is there is about the same run.

    Raises:
        EvalError: it is about another run.
    """
    path = folder.path / "run.json"
    if ranks.rank == 0 and not path.is_file():
        from dit_accel.env import collect

        folder.write(path, {**settings.to_dict(), "environment": collect()})
        return settings
    ranks.wait(folder.path, lambda: [] if path.is_file() else [path], "settings")
    known = read_run_settings(folder.path)
    assert known is not None
    differences = settings.differences(known)
    if differences:
        raise EvalError(
            f"{folder.path} holds a run with other settings: " + "; ".join(differences) + ". Give another --out, or "
            "the same settings to go on"
        )
    return known


def _run(
    pipe: Any, settings: RunSettings, folder: RunFolder, ranks: Ranks, observer: Observer, retry: bool
) -> dict[str, Any] | None:
    # Another number of threads may add numbers up in another order.
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        groups = ranks.mine(settings.groups)
        if retry:
            observer.note(f"{folder.forget(_own_files(settings, folder, ranks))} failures are tried again")
        calibrate_rows(pipe, settings, folder, ranks, observer.note)
        names = [row.name for row in settings.all_rows]
        mine = [(name, sample) for group in groups for sample in group for name in names]
        done = sum(folder.has(name, sample) for name, sample in mine)
        observer.begin(len(mine), done)
        if done < len(mine):
            _rehearse(pipe, settings, folder, observer)
        maker = Maker(pipe, settings, folder, observer)
        for group in groups:
            maker.group(group)
        _attention(pipe, settings, folder, ranks, observer)
        device = torch.device(pipe._execution_device)
        return _merge(settings, folder, ranks, observer, device)
    finally:
        torch.set_num_threads(before)


def _accelerated(settings: RunSettings) -> list[Configuration]:
    return [row for row in settings.rows if row.method is not None]


def _own_files(settings: RunSettings, folder: RunFolder, ranks: Ranks) -> list[Path]:
    """JSON files that this process, and no other, writes."""
    samples = [sample for group in ranks.mine(settings.groups) for sample in group]
    plans = [folder.plan_path(row.name).with_suffix(".json") for row in ranks.mine(needs_calibration(settings))]
    probes = [folder.attention_path(row.name) for row in ranks.mine(_accelerated(settings))]
    return [*plans, *probes, *(folder.record_path(row.name, s) for row in settings.all_rows for s in samples)]


def _rehearse(pipe: Any, settings: RunSettings, folder: RunFolder, observer: Observer) -> None:
    """A short run of everything, so that compilation, self-tests and first allocations are not timed."""
    device = torch.device(pipe._execution_device).type
    observer.note("rehearsing, so that compilation is not timed")
    prompt, seed = [settings.prompts[0]] * settings.batch, list(range(settings.batch))
    short = {**settings.call, "num_inference_steps": _REHEARSAL.get(device, 1)}
    try:
        generate(pipe, prompt, seed, decode=device != "cpu", **short)
    except (ValueError, TypeError, RuntimeError) as error:
        raise EvalError(f"dense attention cannot run, so there is nothing to compare with: {error}") from error
    for row in settings.rows if device != "cpu" else []:
        _rehearse_row(pipe, row, folder, prompt, seed, short)


def _rehearse_row(
    pipe: Any, row: Configuration, folder: RunFolder, prompt: list[str], seed: list[int], call: dict[str, Any]
) -> None:
    if row.method is None:
        return
    try:  # what is wrong with a row is said by its samples
        chosen = {**enable_options(row, folder), "run_density": None}  # two steps cannot reach every density
        with dit_accel.enabled(pipe, row.method, **chosen):
            generate(pipe, prompt, seed, decode=False, **call)
    except (ValueError, RuntimeError):
        return


def _attention(pipe: Any, settings: RunSettings, folder: RunFolder, ranks: Ranks, observer: Observer) -> None:
    """Compare attention outputs of each accelerated row with dense, on the first sample."""
    for row in ranks.mine(_accelerated(settings)) if settings.attention else []:
        path = folder.attention_path(row.name)
        if path.is_file() or row.method is None:
            continue
        observer.note(f"{row.name}: comparing attention outputs")
        first = settings.samples[0]
        found: dict[str, Any]
        try:
            options = enable_options(row, folder)
            found = probe_attention(pipe, row.method, options, settings.prompts[0], first.seed, settings.call)
        except (ValueError, RuntimeError) as error:
            found = {"summary": None, "records": [], "error": str(error)}
        folder.write(path, found)


def _merge(
    settings: RunSettings, folder: RunFolder, ranks: Ranks, observer: Observer, device: torch.device
) -> dict[str, Any] | None:
    """Wait for the other processes' records, and write the summary."""
    if ranks.rank != 0:
        return None
    probed = [row.name for row in _accelerated(settings)] if settings.attention else []

    def missing() -> list[Path]:
        records = [folder.record_path(name, sample) for name, sample in folder.missing(settings)]
        return records + [path for name in probed if not (path := folder.attention_path(name)).is_file()]

    if missing():
        observer.note("waiting for the samples of other processes")
    ranks.wait(folder.path, missing, "samples")
    if settings.distribution:
        observer.note("comparing all clips: " + ", ".join(settings.distribution))
    results = summarise_run(settings, folder, device)
    with writing(folder.path / "results.json"):
        folder.write(folder.path / "results.json", results)
    return results
