"""How much of dense denoising is attention, measured by timing its calls, and the speed-up that bounds."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import dit_accel
from dit_accel.runtime import ModelRun

__all__ = ["attention_share", "ceiling"]


def ceiling(share: float, density: float) -> float:
    """Most that a run of ``density`` can gain if attention is ``share`` of dense time and nothing else changes."""
    return 1.0 / (1.0 - share + share * density)


class _Stopwatch:
    """Times the attention calls of one run object: by events on CUDA, on the host elsewhere."""

    def __init__(self, run: ModelRun) -> None:
        self._run = run
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self) -> None:
        """Time every call from now on."""
        attend = self._run.attend

        def timed(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if query.device.type == "cuda":
                pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
                pair[0].record()
                out = attend(query, *args, **kwargs)
                pair[1].record()
                self._events.append(pair)
                return out
            begin = time.perf_counter()
            out = attend(query, *args, **kwargs)
            self._seconds += time.perf_counter() - begin
            return out

        self._run.__dict__["attend"] = timed

    def stop(self) -> float:
        """Seconds of all calls. The device must have been waited for."""
        self._run.__dict__.pop("attend", None)
        return self._seconds + float(sum(begin.elapsed_time(end) for begin, end in self._events)) / 1e3


def attention_share(pipe: Any, denoise: Callable[[], float]) -> float | None:
    """Share of the denoising loop that is spent in the attention that dit_accel could replace.

    Args:
        pipe: the pipeline.
        denoise: makes a dense run and returns the seconds of its denoising loop.

    Returns:
        A share between 0 and 1, ``None`` where no attention passed through the engine.
    """
    with dit_accel.enabled(pipe, "dense") as handle:
        watches = [_Stopwatch(run) for run in handle.runs.values()]
        for watch in watches:
            watch.start()
        try:
            total = denoise()
        finally:
            spent = sum(watch.stop() for watch in watches)
        calls = sum(status.calls for status in handle.stats().values())
    return min(spent / total, 1.0) if calls and total > 0 else None
