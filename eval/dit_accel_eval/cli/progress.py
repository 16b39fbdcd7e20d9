"""Progress of an evaluation on a terminal, with the time left; one line a sample where there is none."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from dit_accel_eval.runs.observer import Observer
from dit_accel_eval.runs.settings import Sample

__all__ = ["ProgressObserver"]

_WINDOW = 24 * 3600.0


class ProgressObserver(Observer):
    """Shows samples and steps.

    Args:
        console: where to.
        prefix: put before each line, such as the number of the process.
    """

    def __init__(self, console: Console, prefix: str = "") -> None:
        self._console = console
        self._prefix = prefix
        # The time left follows from all samples so far: single ones differ by what their configuration does.
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            speed_estimate_period=_WINDOW,
            disable=not console.is_terminal,
        )
        self._samples = self._progress.add_task("samples", total=None)
        self._steps = self._progress.add_task("steps", total=None, visible=False)
        self._done, self._total = 0, 0

    def __enter__(self) -> ProgressObserver:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def begin(self, total: int, done: int) -> None:
        """See :class:`Observer`."""
        self._done, self._total = done, total
        self._progress.update(self._samples, total=total, completed=done)
        if done:
            self.note(f"{done} of {total} samples are finished already")

    def sample(self, name: str, prompts: list[str]) -> None:
        """See :class:`Observer`."""
        label = f"{name}: {', '.join(prompts)}"
        self._progress.reset(self._steps, total=None, visible=True, description=label[:40])

    def step(self, done: int, steps: int | None) -> None:
        """See :class:`Observer`."""
        self._progress.update(self._steps, completed=done, total=steps)

    def record(self, record: Mapping[str, Any], sample: Sample) -> None:
        """See :class:`Observer`."""
        self._done += 1
        self._progress.update(self._samples, completed=self._done)
        what = f"{record['name']}, {record['prompt'][:30]}, seed {sample.seed}"
        self.note(f"{self._done}/{self._total} {what}: {_outcome(record)}")

    def note(self, text: str) -> None:
        """See :class:`Observer`."""
        self._console.print(f"{self._prefix}{text}", markup=False, highlight=False, soft_wrap=True)


def _outcome(record: Mapping[str, Any]) -> str:
    if record["error"] is not None:
        return f"failed: {record['error']}"
    seconds = f"{record['speed']['denoise_s']:.1f} s"
    psnr = record["metrics"].get("psnr")
    if psnr is None:
        return seconds
    density = record["engine"].get("density")
    work = "" if density is None else f", {density:.3f} of the dense work"
    return f"{psnr:.2f} dB{work}, {seconds}"
