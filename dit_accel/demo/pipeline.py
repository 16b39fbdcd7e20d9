"""Loading the pipeline and generating with a progress bar."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dit_accel.demo.options import DemoError, DemoOptions

__all__ = ["Session", "load"]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep progress bars and advice of other libraries out of the way, and put them back."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    try:
        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
        with warnings.catch_warnings():
            # Newer versions want `dtype`, which older ones do not know.
            warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch_dtype.*")
            yield
    finally:
        diffusers_logging.enable_progress_bar()
        transformers_logging.enable_progress_bar()


def load(folder: Path, device: torch.device) -> Any:
    """Load a pipeline from disk, without looking anywhere else.

    Raises:
        DemoError: a library is missing, or the folder does not hold a pipeline that fits.
    """
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise DemoError(f"the demo needs diffusers: pip install 'dit-accel[diffusers,eval]' ({error})") from None
    main = torch.bfloat16 if device.type == "cuda" else torch.float32
    dtypes = {"default": main, "vae": torch.float32}  # VAEs of video models are not made for bfloat16
    try:
        with _quiet():
            pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtypes, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip() or type(error).__name__
        raise DemoError(f"{folder} could not be loaded: {reason.splitlines()[0]}") from None
    if not hasattr(pipe, "transformer") or not hasattr(pipe, "vae_scale_factor_temporal"):
        raise DemoError(f"{folder} is a {type(pipe).__name__}; the demo needs a video pipeline with a transformer")
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@dataclass(frozen=True)
class Session:
    """A loaded pipeline and how it is called.

    Attributes:
        pipe: the pipeline.
        options: as asked for.
        device: where it runs.
        frames: frames of a clip.
        steps: denoising steps.
        console: where progress goes.
    """

    pipe: Any
    options: DemoOptions
    device: torch.device
    frames: int
    steps: int
    console: Console

    @classmethod
    def open(cls, options: DemoOptions, console: Console) -> Session:
        """Load the model and fit the options to it."""
        device = options.resolved_device()
        pipe = load(options.model_folder(), device)
        frames = options.resolved_frames(pipe.vae_scale_factor_temporal)
        return cls(pipe, options, device, frames, options.resolved_steps(), console)

    @property
    def call(self) -> dict[str, Any]:
        """Arguments of the pipeline call, less the steps."""
        height, width = self.options.size
        return {
            "height": height,
            "width": width,
            "num_frames": self.frames,
            "guidance_scale": self.options.guidance,
        }

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens along time, height and width."""
        patch = self.pipe.transformer.config.patch_size
        spatial = self.pipe.vae_scale_factor_spatial
        latent = (self.frames - 1) // self.pipe.vae_scale_factor_temporal + 1
        height, width = self.options.size
        return latent // patch[0], height // spatial // patch[1], width // spatial // patch[2]

    def generate(self, label: str) -> Any:
        """Generate the clip with a progress bar over the steps."""
        from dit_accel_eval.generate import generate

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(label, total=self.steps)

            def on_step(done: int) -> None:
                progress.update(
                    task, completed=done, description=label if done < self.steps else f"{label}, decoding the latents"
                )

            return generate(
                self.pipe,
                [self.options.prompt],
                [self.options.seed],
                on_step=on_step,
                num_inference_steps=self.steps,
                **self.call,
            )

    def rehearse(self, steps: int) -> None:
        """A short run that nobody looks at, so that compilation and first allocations are not timed."""
        from dit_accel_eval.generate import generate

        generate(
            self.pipe, [self.options.prompt], [self.options.seed], decode=False, num_inference_steps=steps, **self.call
        )
