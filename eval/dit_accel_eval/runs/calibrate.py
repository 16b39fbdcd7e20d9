"""Static plans, made once on prompts of their own and kept in the folder of the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import dit_accel
from dit_accel_eval.compare import Configuration
from dit_accel_eval.files import replacing
from dit_accel_eval.runs.errors import EvalError, writing
from dit_accel_eval.runs.folder import RunFolder
from dit_accel_eval.runs.ranks import Ranks
from dit_accel_eval.runs.rows import is_static
from dit_accel_eval.runs.settings import RunSettings

__all__ = ["calibrate_rows", "enable_options", "needs_calibration"]

# Noise of the calibration runs, fixed so that a plan made again is the same plan.
_SEED = 4242
_NOT_OVERRIDES = ("backend", "min_tokens")


def needs_calibration(settings: RunSettings) -> list[Configuration]:
    """Rows of static methods."""
    return [row for row in settings.rows if is_static(row)]


def calibrate_rows(pipe: Any, settings: RunSettings, folder: RunFolder, ranks: Ranks, note: Any) -> None:
    """Make the plans that are missing, each on one process; the others wait for it.

    A row that cannot be calibrated leaves the reason in ``plans/NAME.json``.
    """
    rows = needs_calibration(settings)
    for row in ranks.mine(rows):
        path = folder.plan_path(row.name)
        if path.is_file() or path.with_suffix(".json").is_file():
            continue
        note(f"{row.name}: calibrating on {len(settings.calibration)} other prompts")
        try:
            plan = _calibrate(pipe, row, settings)
        except (ValueError, RuntimeError) as error:
            folder.write(path.with_suffix(".json"), {"error": f"calibration: {error}"})
            continue
        with writing(path), replacing(path, owner=folder.owner) as temporary:
            plan.save(temporary)

    def missing() -> list[Path]:
        paths = [folder.plan_path(row.name) for row in rows]
        return [path for path in paths if not path.is_file() and not path.with_suffix(".json").is_file()]

    ranks.wait(folder.path, missing, "static plans")


def _calibrate(pipe: Any, row: Configuration, settings: RunSettings) -> dit_accel.StaticPlan:
    overrides = {key: value for key, value in row.options.items() if key not in _NOT_OVERRIDES}
    prompts: Sequence[str] = list(settings.calibration)
    assert row.method is not None
    call = {**settings.call, "output_type": "latent", "generator": torch.Generator("cpu").manual_seed(_SEED)}
    plan: dit_accel.StaticPlan = dit_accel.calibrate(pipe, prompts, row.method, overrides=overrides, **call)
    return plan


def enable_options(row: Configuration, folder: RunFolder) -> dict[str, Any]:
    """Options of :func:`dit_accel.enable` for a row.

    Raises:
        EvalError: the row is static and could not be calibrated.
    """
    if not is_static(row):
        return dict(row.options)
    path = folder.plan_path(row.name)
    if not path.is_file():
        raise EvalError(folder.read(path.with_suffix(".json"))["error"])
    options = {key: row.options[key] for key in _NOT_OVERRIDES if key in row.options}
    return {**options, "plan": path}
