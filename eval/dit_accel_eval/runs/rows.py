"""Which configurations a comparison has: methods times densities, and dense with another seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import dit_accel
from dit_accel.policy import Policy
from dit_accel.presets import get_method
from dit_accel_eval.compare import Configuration
from dit_accel_eval.runs.errors import EvalError

__all__ = ["DENSE", "FLOOR", "FLOOR_OFFSET", "build_rows", "is_static", "row_to_dict", "why_unreachable"]

#: Name of the baseline.
DENSE = "dense"
#: Name of the row that says how far apart unrelated clips are.
FLOOR = "another seed"
FLOOR_OFFSET = 1000

# Options of enable() that are no fields of a method.
_ENABLE_OPTIONS = ("run_density", "backend", "min_tokens", "quality", "target_psnr", "target_error", "profile")


def build_rows(
    methods: Sequence[str],
    densities: Sequence[float],
    options: Mapping[str, Any] | None = None,
    *,
    floor: bool = True,
) -> list[Configuration]:
    """One configuration for each method and density, after the floor.

    Args:
        methods: method names.
        densities: work of the whole run over that of a dense run. A method that keeps all blocks gets one row.
        options: options of :func:`dit_accel.enable` for all of them.
        floor: whether dense with another seed is a row.

    Raises:
        EvalError: an unknown method, a density out of range, an option that a method refuses, or a row twice.
    """
    if not methods:
        raise EvalError("at least one method is needed, such as auto")
    rows = [Configuration(FLOOR, seed_offset=FLOOR_OFFSET)] if floor else []
    for density in densities:
        if not 0 < density <= 1:
            raise EvalError(f"density must be above 0 and at most 1, got {density:g}")
    for name in methods:
        targets: Sequence[float | None] = densities or (None,)
        for target in targets:
            row = _row(name, target, dict(options or {}))
            if row not in rows:
                rows.append(row)
    names = [row.name for row in rows]
    if len(set(names)) != len(names):
        raise EvalError(f"each configuration must have a name of its own, got {', '.join(names)}")
    return rows


def _row(name: str, density: float | None, options: dict[str, Any]) -> Configuration:
    try:
        method = get_method(name)
        changed = method.replace(**{key: value for key, value in options.items() if key not in _ENABLE_OPTIONS})
    except (ValueError, TypeError) as error:
        raise EvalError(str(error)) from None
    target = None if changed.is_dense else density
    if target is not None:
        # The masks of a static method serve every step: their density is that of the run.
        options["density" if method.static else "run_density"] = target
    label = name if target is None else f"{name} {target:g}"
    return Configuration(label, name, options, labels={"method": name, "target": target})


def is_static(row: Configuration) -> bool:
    """Whether the row's method must be calibrated first."""
    return row.method is not None and get_method(row.method).static


def row_to_dict(row: Configuration) -> dict[str, Any]:
    """Plain JSON types."""
    return {
        "name": row.name,
        "method": row.method,
        "options": dict(row.options),
        "seed_offset": row.seed_offset,
        "labels": dict(row.labels),
    }


def why_unreachable(row: Configuration, steps: int | None) -> str | None:
    """Why a row cannot run, as far as that can be said without the model; ``None`` if nothing speaks against it."""
    if row.method is None or is_static(row) or row.options.get("run_density") is None or steps is None:
        return None
    overrides = {key: value for key, value in row.options.items() if key not in _ENABLE_OPTIONS}
    try:
        method: dit_accel.Method = get_method(row.method).replace(**overrides)
        Policy(method).sparse_density(float(row.options["run_density"]), steps)
    except ValueError as error:
        return str(error)
    return None
