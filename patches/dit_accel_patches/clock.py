"""Where a forward call stands in the denoising loop, from whoever knows without asking the device.

In this order: what the pipeline says (:mod:`dit_accel_patches.context`), the index of its scheduler, the timesteps of the
calls so far. A timestep on an accelerator is read, which waits for the device, only if nobody else knows the step.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.adapter import StepInfo
from dit_accel.geometry import TokenGeometry
from dit_accel_patches.arguments import argument
from dit_accel_patches.callers import calling_pipeline

__all__ = ["Clock"]

_TIMESTEP_NAMES = ("timestep", "timesteps", "t")
_BRANCHES = ("cond", "uncond")
# Timesteps reach the model in its dtype: bfloat16 has 8 bits.
_SAME_TIMESTEP = 1e-2
_MISSING = object()


@dataclass
class _Last:
    """The call before."""

    step: int | None = None
    timestep: float | None = None
    ordinal: int = 0
    grid: Any = None
    schedule: Any = None
    source: str = "calls"


_MOST_BRANCHES = 4


class Clock:
    """Tells the step of each forward call of one transformer, and when a new run begins.

    Args:
        pipe: the pipeline whose scheduler drives the transformer, if there is one; held weakly.
    """

    def __init__(self, pipe: Any | None = None) -> None:
        self._pipe = weakref.ref(pipe) if pipe is not None else None
        self._caller: weakref.ref[Any] | None = None
        self._last: _Last | None = None
        self._first: int | None = None
        self._opening: set[str] = set()
        self._scale = 1000.0
        self._told = StepInfo()

    def reset(self) -> None:
        """Forget the run: the next call is the first of a new one."""
        self._last = None

    def tick(
        self,
        module: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        context: Any,
        geometry: TokenGeometry | str,
    ) -> tuple[StepInfo, bool]:
        """Return where this call stands and whether it begins a new run.

        Args:
            module: the transformer.
            args, kwargs: the arguments of its forward call.
            context: diffusers' ``CacheContext`` of the call, ``None`` if there is none.
            geometry: token geometry of the call.
        """
        raw = _timestep_of(module, args, kwargs)
        timestep = _to_float(raw, wait=False)
        now = _Last(timestep=timestep, grid=None if isinstance(geometry, str) else geometry.grid)
        step, steps = _from_context(context)
        if step is not None:
            now.source = "context"
        else:
            step, steps, now.schedule = self._from_scheduler(module, timestep)
            now.source = "scheduler" if step is not None else "timestep"
        if step is None:
            if self._last is not None and _is_captured(raw):
                # Nothing can be read. What is captured uses the plan of the call before, whatever step it is for.
                return replace(self._told, step=None, steps=None), False
            timestep = now.timestep = _to_float(raw, wait=True)
            now.source = "timestep" if timestep is not None else "calls"
        now.step = step
        name = getattr(context, "name", None)
        fresh = self._begins_run(now, name)
        if fresh or self._last is None:
            if now.source == "timestep" and timestep is not None:
                # The first timestep of a run is its largest, which tells the models that count from 0 to 1.
                self._scale = 1000.0 if timestep > 1.0 else 1.0
                now.step = 0
            self._first = now.step
        else:
            self._advance(now, named=name is not None)
        self._last = now
        branch = name or (_BRANCHES[now.ordinal] if now.ordinal < 2 else f"branch{now.ordinal}")
        progress = self._progress(now, steps)
        self._told = StepInfo(now.step, steps, progress, str(branch), timestep, now.source)
        return self._told, fresh

    def _from_scheduler(self, module: nn.Module, timestep: float | None) -> tuple[int | None, int | None, Any]:
        """Step, number of steps and the schedule of the pipeline's scheduler, where they are about this call."""
        pipe = self._pipe() if self._pipe is not None else None
        if pipe is None:
            return None, None, None
        if not _in_loop(pipe):
            # Another pipeline may share the transformer, as `from_pipe` makes them.
            other = self._caller() if self._caller is not None else None
            if other is None or not _in_loop(other):
                other = calling_pipeline(module)
                self._caller = None if other is None else weakref.ref(other)
            pipe = other
        return _told_by(pipe, timestep)

    def _begins_run(self, now: _Last, name: str | None) -> bool:
        if self._differs_in_run(now):
            self._opening = {name} if name is not None else set()
            return True
        if name is None or not self._in_first_step(now):
            return False
        # A branch that comes again in the first step: the run before was interrupted there.
        again = name in self._opening
        self._opening = {name} if again else self._opening | {name}
        return again

    def _in_first_step(self, now: _Last) -> bool:
        last = self._last
        if now.source != "timestep" or last is None:
            return now.step == self._first
        return now.timestep == last.timestep and last.step == self._first

    def _differs_in_run(self, now: _Last) -> bool:
        last = self._last
        if last is None:
            return True
        if now.grid is not None and last.grid is not None and now.grid != last.grid:
            return True
        if now.source != last.source:
            return False
        if last.schedule is not None and now.schedule is not None and last.schedule() is not now.schedule():
            return True
        if now.source == "timestep":
            return now.timestep is not None and last.timestep is not None and now.timestep > last.timestep
        return now.step is not None and last.step is not None and now.step < last.step

    def _advance(self, now: _Last, *, named: bool) -> None:
        """Number the call within its run and within its step."""
        last = self._last
        assert last is not None
        if now.source == "timestep":
            same = now.timestep == last.timestep
            now.step = (last.step or 0) + (0 if same else 1)
        else:
            same = now.step is not None and now.step == last.step
        # More calls of one step than any guidance makes are a loop over it, not ever more branches.
        now.ordinal = (last.ordinal + 1) % _MOST_BRANCHES if same and not named else 0

    def _progress(self, now: _Last, steps: int | None) -> float | None:
        """Fraction of the whole schedule that lies behind, which a second transformer does not begin at 0."""
        if now.step is not None and steps:
            value = now.step / steps
        elif now.timestep is not None:
            value = 1.0 - now.timestep / self._scale
        else:
            return None
        return min(max(value, 0.0), math.nextafter(1.0, 0.0))


def _in_loop(pipe: Any) -> bool:
    """Whether a pipeline is denoising, as far as it says so."""
    loop = getattr(pipe, "_current_timestep", _MISSING)
    return not (loop is None or (loop is _MISSING and hasattr(type(pipe), "current_timestep")))


def _told_by(pipe: Any, timestep: float | None) -> tuple[int | None, int | None, Any]:
    """Step, number of steps and schedule of a pipeline, the first two ``None`` where they are not about this call."""
    scheduler: Any = getattr(pipe, "scheduler", None)
    schedule = getattr(scheduler, "timesteps", None)
    # A pipeline outside its loop has nothing to say about a call that somebody else makes.
    if not isinstance(schedule, Tensor) or not _in_loop(pipe):
        return None, None, None
    told = _to_float(getattr(pipe, "_current_timestep", None), wait=False)
    if told is not None and timestep is not None and not _same(told, timestep):
        return None, None, None
    made = weakref.ref(schedule)
    if not hasattr(scheduler, "step_index"):
        return None, None, made  # DDIM and others do not count, but each run has a schedule of its own
    step = scheduler.step_index
    if step is None:
        step = getattr(scheduler, "begin_index", None) or 0
    if not isinstance(step, int) or not 0 <= step < len(schedule):
        return None, None, None
    return step, len(schedule), made


def _from_context(context: Any) -> tuple[int | None, int | None]:
    step = getattr(context, "step_index", None)
    steps = getattr(context, "num_inference_steps", None)
    return (step if isinstance(step, int) else None), (steps if isinstance(steps, int) else None)


def _timestep_of(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    for name in _TIMESTEP_NAMES:
        value = argument(module, args, kwargs, name)
        if value is not None:
            return value
    return None


def _to_float(value: Any, *, wait: bool) -> float | None:
    """The timestep as a number: of a tensor ``[]``, ``[B]`` or ``[B, S]`` the largest, for clean tokens have 0."""
    if isinstance(value, Tensor):
        if value.numel() == 0 or value.is_meta or not (wait or value.device.type == "cpu") or _is_captured(value):
            return None
        with torch.no_grad():
            return float(value.max())
    return float(value) if isinstance(value, int | float) else None


def _is_captured(value: Any) -> bool:
    """Whether a CUDA graph is being captured from what is done with a tensor."""
    return isinstance(value, Tensor) and value.is_cuda and torch.cuda.is_current_stream_capturing()


def _same(a: float, b: float) -> bool:
    """Whether two timesteps are one, up to rounding and to models that count from 0 to 1."""
    return any(abs(a - b * scale) <= _SAME_TIMESTEP * max(abs(a), 1.0) for scale in (1.0, 1000.0))
