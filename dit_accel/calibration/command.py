"""``dit-accel calibrate`` once a pipeline is loaded: a progress bar, and the profile on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from dit_accel.api import calibrate
from dit_accel.calibration.run import Progress
from dit_accel.profiles import Profile
from dit_accel.profiles.files import location

__all__ = ["calibrate_command"]


def calibrate_command(
    pipe: Any,
    prompts: Sequence[str],
    method: str | None,
    target: str,
    out: Path,
    work: Path | None,
    options: Mapping[str, Any],
) -> Profile:
    """Calibrate, write the profile and print it.

    Raises:
        ValueError: what :func:`dit_accel.calibrate` raises.
        OSError: if the profile cannot be written.
    """
    console = Console()
    location(out).parent.mkdir(parents=True, exist_ok=True)  # what cannot be written is said before, not after
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bar(*columns, console=console) as bar:
        task = bar.add_task("calibrating", total=None)

        def tell(progress: Progress) -> None:
            bar.update(task, completed=progress.done, total=progress.total, description=progress.what)

        profile = calibrate(pipe, prompts, method, target=target, folder=work, progress=tell, **dict(options))
    file = profile.save(out)
    console.print(str(profile), markup=False, highlight=False)
    console.print(f"written to {file}", markup=False, highlight=False)
    return profile
