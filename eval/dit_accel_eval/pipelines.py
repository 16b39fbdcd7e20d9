"""Reading a pipeline folder from disk, of video or of images, without looking anywhere else."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

__all__ = ["IMAGE_CLASSES", "PipelineError", "load_pipeline", "pipeline_class"]

#: Pipelines that make pictures.
IMAGE_CLASSES = ("FluxPipeline",)


class PipelineError(ValueError):
    """A folder does not hold a pipeline that can be read."""


def pipeline_class(folder: str | Path) -> str:
    """Name of the diffusers class that a folder is for.

    Raises:
        PipelineError: there is no ``model_index.json``, or it is no such file.
    """
    path = Path(folder) / "model_index.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error) if isinstance(error, OSError) else f"it is no pipeline index ({error!r})"
        raise PipelineError(f"{path} could not be read: {reason}") from None
    return str(found)


def load_pipeline(folder: str | Path, device: str | torch.device = "cpu") -> Any:
    """Load a pipeline, in float32 on the CPU and in bfloat16 on a GPU, with its progress bar off.

    The VAE of a video pipeline stays in float32, for which it is made; `FluxPipeline` hands its latents to the VAE as
    they are, and so has all parts in one type.

    Args:
        folder: as ``save_pretrained`` writes it.
        device: where the parts go.

    Raises:
        PipelineError: the folder is missing, damaged, or needs a library that is not installed.
    """
    device, name = torch.device(device), pipeline_class(folder)
    main = torch.bfloat16 if device.type == "cuda" else torch.float32
    dtypes = {"default": main} if name in IMAGE_CLASSES else {"default": main, "vae": torch.float32}
    try:
        from diffusers import DiffusionPipeline

        with _quiet():
            pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtypes, local_files_only=True)
    except Exception as error:  # every library on the way has exceptions of its own for a damaged file
        reason = str(error).strip() or type(error).__name__
        raise PipelineError(f"{folder} could not be loaded: {reason.splitlines()[0]}") from error
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


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
