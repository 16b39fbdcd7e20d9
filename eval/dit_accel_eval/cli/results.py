"""The table at the end of an evaluation, and what is said of samples that failed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from dit_accel_eval.cli.shared import table

__all__ = ["failures", "print_results"]


def print_results(console: Console, results: Mapping[str, Any]) -> None:
    """One line a row: work, PSNR, SSIM and speed-up; times never stand without quality."""
    shown = table(
        "against dense with the same seed", "configuration", "work", "PSNR, dB", "SSIM", "speed-up", "samples"
    )
    for row in results["rows"]:
        good = row["samples"] > 0
        speed = row["speed"].get("speedup") if good and row["method"] is not None else None
        shown.add_row(
            row["name"],
            _number(row["density"].get("run"), 3),
            _mean(row, "psnr", 2),
            _mean(row, "ssim", 4),
            _number(speed, 2),
            f"{row['samples']}" + (f" ({row['failed']} failed)" if row["failed"] else ""),
        )
    console.print(shown)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _mean(row: Mapping[str, Any], name: str, digits: int) -> str:
    found = row["metrics"].get(name)
    if not found:
        return ""
    spread = "" if found["std"] is None else f" ± {found['std']:.{digits}f}"
    return f"{found['mean']:.{digits}f}{spread}"


def failures(results: Mapping[str, Any], folder: Path) -> str | None:
    """What failed, with where to look; ``None`` if nothing did."""
    failed = [row for row in results["rows"] if row["failed"]]
    if not failed:
        return None
    told = "; ".join(f"{row['name']}: {row['failed']} samples, {row['error']}" for row in failed)
    return (
        f"{sum(row['failed'] for row in failed)} samples failed, the rest is kept ({told}). Each has its reason in "
        f"{folder}/samples/*/*.json; --retry-errors makes them again"
    )
