"""Clips from a diffusers pipeline, with the denoising loop timed apart from text encoding and decoding."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dit_accel_eval.video import Frames, to_uint8

__all__ = ["Clips", "generate"]


@dataclass(frozen=True, eq=False)
class Clips:
    """What a pipeline call made and how long each part took.

    Attributes:
        frames: uint8 ``[B, T, H, W, 3]``, empty where no decoding was asked for.
        encode_seconds: from the call to the first entry into the transformer.
        denoise_seconds: the denoising loop, from there to the end of the last step.
        decode_seconds: from there to the frames.
    """

    frames: Frames
    encode_seconds: float
    denoise_seconds: float
    decode_seconds: float


def generate(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    on_step: Callable[[int], None] | None = None,
    decode: bool = True,
    **call: Any,
) -> Clips:
    """Generate one clip for each prompt, each with the noise of its own seed, whatever the batch.

    Args:
        pipe: a diffusers video pipeline that knows ``callback_on_step_end``.
        prompts: one for each clip.
        seeds: one for each clip.
        on_step: called with the number of finished steps.
        decode: whether to make frames of the latents.
        **call: further arguments of the pipeline call.

    Raises:
        ValueError: prompts and seeds do not match in number, or the clips hold NaN.
    """
    if len(prompts) != len(seeds) or not prompts:
        raise ValueError(f"there must be one seed for each prompt, got {len(prompts)} prompts and {len(seeds)} seeds")
    device = torch.device(pipe._execution_device)
    # On the CPU, so that a seed means the same noise on every device.
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    marks: dict[str, float] = {}

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def entered(*_: Any) -> None:
        if "loop" not in marks:
            marks["loop"] = now()

    def stepped(_pipe: Any, index: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if index + 1 == len(pipe.scheduler.timesteps):
            marks["end"] = now()
        if on_step is not None:
            on_step(index + 1)
        return tensors

    modules = [m for m in (pipe.transformer, getattr(pipe, "transformer_2", None)) if m is not None]
    hooks = [module.register_forward_pre_hook(entered) for module in modules]
    begin = now()
    try:
        result = pipe(
            prompt=list(prompts),
            generator=generators,
            callback_on_step_end=stepped,
            output_type="np" if decode else "latent",
            **call,
        ).frames
    finally:
        for hook in hooks:
            hook.remove()
    end = now()
    frames = np.stack([to_uint8(clip) for clip in result]) if decode else np.zeros((0, 0, 0, 0, 3), np.uint8)
    return Clips(frames, marks["loop"] - begin, marks["end"] - marks["loop"], end - marks["end"])
