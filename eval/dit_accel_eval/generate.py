"""Clips from a diffusers pipeline, with the denoising loop and its steps timed apart from text encoding and decoding."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from dit_accel_eval.video import Frames, to_uint8

__all__ = ["BadClip", "Clips", "generate"]


class BadClip(ValueError):
    """A pipeline made something that is no clip, such as frames with NaN."""


@dataclass(frozen=True, eq=False)
class Clips:
    """What a pipeline call made and how long each part took.

    Attributes:
        frames: uint8 ``[B, T, H, W, 3]``, empty where no decoding was asked for; an image is a clip of one frame.
        encode_seconds: from the call to the first entry into the transformer.
        denoise_seconds: the denoising loop, from there to the end of the last step.
        decode_seconds: from there to the frames.
        step_seconds: time of each step; together they are the loop.
        peak_bytes: most device memory allocated during the call, ``None`` where the device does not count it.
        problems: why a clip of the batch is none, by its place; its frames are black.
    """

    frames: Frames
    encode_seconds: float
    denoise_seconds: float
    decode_seconds: float
    step_seconds: tuple[float, ...] = ()
    peak_bytes: int | None = None
    problems: Mapping[int, str] = field(default_factory=dict)


class _Marks:
    """When the loop was entered and each step ended, on the host, and on CUDA by events that nobody waits for."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.device = torch.device(pipe._execution_device)
        self.times: list[float | torch.cuda.Event] = []
        self.entered_at: float | None = None
        self.ended_at: float | None = None

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def mark(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            self.times.append(event)
        else:
            self.times.append(time.perf_counter())

    def entered(self, *_: Any) -> None:
        if self.entered_at is None:
            self.entered_at = self.now()
            self.mark()

    def stepped(self, index: int) -> None:
        self.mark()
        if index + 1 == len(self.pipe.scheduler.timesteps):
            self.ended_at = self.now()

    def step_seconds(self) -> tuple[float, ...]:
        """Differences of neighbouring marks. The device must have been waited for."""
        return tuple(_between(a, b) for a, b in zip(self.times, self.times[1:]))


def _between(first: Any, second: Any) -> float:
    return float(second - first if isinstance(first, float) else first.elapsed_time(second) / 1e3)


def generate(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    on_step: Callable[[int], None] | None = None,
    decode: bool = True,
    strict: bool = True,
    **call: Any,
) -> Clips:
    """Generate one clip for each prompt, each with the noise of its own seed, whatever the batch.

    Args:
        pipe: a diffusers pipeline for video or images that knows ``callback_on_step_end``.
        prompts: one for each clip.
        seeds: one for each clip.
        on_step: called with the number of finished steps.
        decode: whether to make frames of the latents.
        strict: whether a clip with NaN is an error; otherwise it is noted in :attr:`Clips.problems`.
        **call: further arguments of the pipeline call.

    Raises:
        BadClip: clips hold NaN or infinity.
        ValueError: prompts and seeds do not match in number, or the pipeline's steps cannot be followed.
    """
    if len(prompts) != len(seeds) or not prompts:
        raise ValueError(f"there must be one seed for each prompt, got {len(prompts)} prompts and {len(seeds)} seeds")
    marks = _Marks(pipe)
    # On the CPU, so that a seed means the same noise on every device.
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]

    def stepped(_pipe: Any, index: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        marks.stepped(index)
        if on_step is not None:
            on_step(index + 1)
        return tensors

    modules = [m for m in (pipe.transformer, getattr(pipe, "transformer_2", None)) if m is not None]
    hooks = [module.register_forward_pre_hook(marks.entered) for module in modules]
    if marks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(marks.device)
    begin = marks.now()
    try:
        output = pipe(
            prompt=list(prompts),
            generator=generators,
            callback_on_step_end=stepped,
            output_type="np" if decode else "latent",
            **call,
        )
    finally:
        for hook in hooks:
            hook.remove()
    end = marks.now()
    if marks.entered_at is None or marks.ended_at is None:
        raise ValueError(f"{type(pipe).__name__} did not call its transformer or did not report its last step")
    frames, problems = _frames(output, list(zip(prompts, seeds)), decode)
    if problems and strict:
        raise BadClip("; ".join(problems.values()))
    return Clips(
        frames,
        marks.entered_at - begin,
        marks.ended_at - marks.entered_at,
        end - marks.ended_at,
        marks.step_seconds(),
        torch.cuda.max_memory_allocated(marks.device) if marks.device.type == "cuda" else None,
        problems,
    )


def _frames(output: Any, wanted: Sequence[tuple[str, int]], decode: bool) -> tuple[Frames, dict[int, str]]:
    """Frames uint8 ``[B, T, H, W, 3]`` of what a pipeline returned, and what is wrong with which of them."""
    if not decode:
        return np.zeros((0, 0, 0, 0, 3), np.uint8), {}
    clips = output.frames if hasattr(output, "frames") else [image[None] for image in output.images]
    made: list[Frames] = []
    problems: dict[int, str] = {}
    for index, (clip, (prompt, seed)) in enumerate(zip(clips, wanted)):
        try:
            made.append(to_uint8(clip))
        except ValueError as error:
            problems[index] = f"prompt {prompt!r}, seed {seed}: {error}"
            made.append(np.zeros(np.shape(clip), np.uint8))
    return np.stack(made), problems
