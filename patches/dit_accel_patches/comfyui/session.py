"""What one accelerated model remembers: settings for good, runs until the sampler is done."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dit_accel.adapter import StepInfo
from dit_accel.geometry import TokenGeometry
from dit_accel.ledger import RunStatus
from dit_accel.logging import get_logger
from dit_accel.method import Method
from dit_accel.presets import get_method
from dit_accel.runtime import ModelRun
from dit_accel.static_plan import Recorder, StaticPlan
from dit_accel_patches.comfyui.blocks import BlockNames, Numbering
from dit_accel_patches.comfyui.families import Family
from dit_accel_patches.comfyui.layouts import Layout
from dit_accel_patches.comfyui.schedule import Schedule, Window, sigma_of
from dit_accel_patches.comfyui.settings import Settings

__all__ = ["Forward", "Session"]

_logger = get_logger("dit_accel.comfyui")
# Prompts of different lengths, tiles and areas make several geometries in a run; a plan of each is kept.
_MOST_RUNS = 8
_MOST_PASSES = 16
_Key = tuple[TokenGeometry, torch.device]


@dataclass
class Forward:
    """One forward call of the diffusion model; travels in its ``transformer_options``."""

    session: Session
    layout: Layout | str
    step: StepInfo
    numbering: Numbering
    inside: bool = False
    begun: set[int] = field(default_factory=set)
    masks: dict[int, tuple[Tensor, Tensor | str | None]] = field(default_factory=dict)


class Session:
    """State of one accelerated model, shared by its clones and held by closures only, so that no clone copies it.

    Args:
        settings: what the user chose.
        family: how the model lays out its tokens.
        window: sigmas between which attention may be sparse.
        model: the diffusion model.
        plan: static plan of a profile.
        recorder: watches dense runs instead of making sparse ones.
    """

    def __init__(
        self,
        settings: Settings,
        family: Family,
        window: Window,
        model: Any,
        *,
        plan: StaticPlan | None = None,
        recorder: Recorder | None = None,
        verbose: bool = False,
    ) -> None:
        self.settings = settings
        self.family = family
        self.model = type(model).__name__
        self.plan = plan
        self.recorder = recorder
        self.recorded: ModelRun | None = None
        self._watched: _Key | None = None
        self.verbose = verbose
        self.method: Method = settings.build() if plan is None else plan.method
        self._window = window
        self._counts = family.counts(model)
        self._lock = threading.RLock()
        self._said: set[str] = set()
        self._finished: list[RunStatus] = []
        self._last_sigma: float | None = None
        self._begin_run(None, None)

    def begin_forward(
        self, model: Any, args: Sequence[Any], kwargs: Mapping[str, Any], options: Mapping[str, Any]
    ) -> Forward:
        """Start of a forward call: reads its layout and its place in the run."""
        with self._lock:
            sigma = sigma_of(options)
            self._follow(options.get("sample_sigmas"), sigma)
            branch = self._branch(options, sigma)
            if self._schedule is None or sigma is None:
                step = StepInfo(branch=branch, timestep=sigma)
            else:
                step = self._schedule.info(sigma, branch)
            self._last_sigma = sigma
        layout = self.family.read(model, args, {**kwargs, "transformer_options": options})
        return Forward(self, layout, step, Numbering(self._names))

    def run(self, geometry: TokenGeometry, forward: Forward, query: Tensor) -> ModelRun:
        """The run of sequences with this geometry on this device, ready for calls of this forward call."""
        key = (geometry, query.device)
        with self._lock:
            run = self._runs.pop(key, None) or self._new_run(key, query)
            self._runs[key] = run  # the latest stand last
            while len(self._runs) > _MOST_RUNS:
                self._close(self._runs.pop(next(iter(self._runs))))
        if id(run) not in forward.begun:
            forward.begun.add(id(run))
            run.begin_forward(geometry, forward.step)
        return run

    def outside(self, step: StepInfo) -> str | None:
        """Why a call with a static plan is dense now: the engine's schedule does not ask static plans."""
        if self.plan is None or step.step is None or step.steps is None:
            return None
        place = step.step / step.steps
        if place < self.warmup - 1e-6:
            return "warm-up"
        return "end" if place >= self.end - 1e-6 else None

    def decline(self, reason: str) -> None:
        """Count a call that could not be sparse, and say why, once."""
        with self._lock:
            self._declined[reason] += 1
        self.say(logging.WARNING, f"{self.model} stays dense: {reason}")

    def say(self, level: int, message: str) -> None:
        """Log a message the first time it comes."""
        if message not in self._said:
            self._said.add(message)
            _logger.log(level, "%s", message)

    def end_run(self) -> None:
        """The sampler is done: keep the statistics and forget everything else."""
        with self._lock:
            if self._runs or self._declined:
                self._finished = self._read()
                for run in self._runs.values():
                    run.reset()
            if self.verbose and self._finished:
                for status in self._finished:
                    _logger.info("%s", status)
            self._begin_run(None, None)
        self.overrides.clear()

    def status(self) -> list[RunStatus]:
        """What the current run, or else the latest, computed; one entry for each geometry. Waits for the device."""
        with self._lock:
            return self._read() if self._runs or self._declined else list(self._finished)

    def _read(self) -> list[RunStatus]:
        found = list(self._closed)
        for run in self._runs.values():
            run.layers = self._names.names
            found.append(run.status())
        if self._declined:
            count = sum(self._declined.values())
            found.append(RunStatus(self.model, self.method.name, calls=count, reasons=dict(self._declined)))
        return found

    def _close(self, run: ModelRun) -> None:
        run.layers = self._names.names
        self._closed.append(run.status())
        run.reset()

    def _begin_run(self, tensor: Tensor | None, schedule: Schedule | None) -> None:
        self._sigmas = None if tensor is None else weakref.ref(tensor)
        self._schedule = schedule
        self._last_sigma = None
        self._runs: dict[_Key, ModelRun] = {}
        self._closed: list[RunStatus] = []
        self._declined: Counter[str] = Counter()
        self._passes: dict[tuple[Any, ...], tuple[float | None, int]] = {}
        self._names = BlockNames(self.family.blocks, self._counts)
        self.overrides: dict[int, tuple[Any, Any]] = {}
        self.warmup, self.end = (0.0, 1.0) if schedule is None else schedule.shares(self._window)

    def _follow(self, sample_sigmas: Any, sigma: float | None) -> None:
        """Begin a new run where the sampler does: at another schedule, or at a sigma above the last one."""
        last = self._last_sigma
        rose = sigma is not None and last is not None and sigma > last
        if isinstance(sample_sigmas, Tensor):
            if self._sigmas is not None and self._sigmas() is sample_sigmas:
                return
            schedule = Schedule.read(sample_sigmas)
            if schedule == self._schedule and self._sigmas is not None and not rose:
                self._sigmas = weakref.ref(sample_sigmas)  # another device's copy
                return
            self._restart(sample_sigmas, schedule)
        elif rose:
            self._restart(None, None)

    def _restart(self, tensor: Tensor | None, schedule: Schedule | None) -> None:
        if self._runs or self._declined:
            self.end_run()
        self._begin_run(tensor, schedule)

    def _branch(self, options: Mapping[str, Any], sigma: float | None) -> str:
        """Name of the conditioning, and which of its passes at this sigma it is: windows and tiles are passes."""
        who = tuple(map(str, options.get("uuids") or options.get("cond_or_uncond") or ()))
        before, count = self._passes.get(who, (None, 0))
        count = count + 1 if before is not None and before == sigma else 0
        self._passes[who] = (sigma, count)
        return " ".join((*who, str(count % _MOST_PASSES)))

    def _new_run(self, key: _Key, query: Tensor) -> ModelRun:
        watched = self.recorder is not None and self._watched in (None, key)
        method = self.method if self.recorder is None or watched else get_method("dense")
        if self.plan is None:
            method = method.replace(warmup=self.warmup, end=self.end)
        if self.plan is None and self.recorder is None:
            method = self._with_blocks(method)
        run = ModelRun(
            method,
            model=self.model,
            backend=os.environ.get("DIT_ACCEL_BACKEND") or None,
            min_tokens=self.settings.min_tokens if self.recorder is None else 0,
            static=self.plan,
        )
        run.set_layers(self._names.names)
        if watched:  # a plan has one geometry: the first that came, in every run of the calibration
            self._watched, self.recorded, run.recorder = key, run, self.recorder
        return run

    def _with_blocks(self, method: Method) -> Method:
        """The method with the block size that was asked for, or on Hopper that of the fastest kernel."""
        if method.is_dense:
            return method
        if self.settings.block_size != "auto":
            size = int(self.settings.block_size)
            return method.replace(block_q=size, block_k=size)
        if method.hopper_blocks is None and (method.block_q, method.block_k) == (64, 64):
            return method.replace(hopper_blocks=(128, 128))
        return method
