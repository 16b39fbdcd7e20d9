"""Sampling inside a node: calibration and comparison run ComfyUI's own sampler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Sampling", "decode", "sampler_inputs"]


@dataclass(frozen=True)
class Sampling:
    """The inputs of KSampler, but for the model."""

    positive: Any
    negative: Any
    latent_image: dict[str, Any]
    seed: int
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    denoise: float

    def __call__(self, model: Any, *, seed: int | None = None) -> dict[str, Any]:
        """Sample with ``model``, as KSampler does; returns a latent."""
        import nodes  # type: ignore[import-not-found,unused-ignore]

        (latent,) = nodes.common_ksampler(
            model,
            self.seed if seed is None else seed,
            self.steps,
            self.cfg,
            self.sampler_name,
            self.scheduler,
            self.positive,
            self.negative,
            self.latent_image,
            denoise=self.denoise,
        )
        return dict(latent)


def decode(vae: Any, latent: dict[str, Any]) -> Tensor:
    """Pictures ``[N, H, W, 3]`` of a latent; frames of a video stand one behind the other."""
    with torch.no_grad():
        images = vae.decode(latent["samples"])
    if not isinstance(images, Tensor):
        raise ValueError(f"the VAE returned {type(images).__name__}; connect the VAE of this model")
    return images.reshape(-1, *images.shape[-3:]) if images.ndim == 5 else images


def sampler_inputs() -> dict[str, Any]:
    """Declarations of KSampler's inputs for ``INPUT_TYPES``."""
    try:
        import comfy.samplers

        samplers, schedulers = list(comfy.samplers.KSampler.SAMPLERS), list(comfy.samplers.KSampler.SCHEDULERS)
    except ImportError:
        samplers, schedulers = ["euler"], ["simple"]
    return {
        "positive": ("CONDITIONING",),
        "negative": ("CONDITIONING",),
        "latent_image": ("LATENT",),
        "seed": ("INT", {"default": 0, "min": 0, "max": 2**64 - 1, "control_after_generate": True}),
        "steps": ("INT", {"default": 20, "min": 1, "max": 1000, "tooltip": "As in the KSampler that you use."}),
        "cfg": ("FLOAT", {"default": 5.0, "min": 0.0, "max": 100.0, "step": 0.1}),
        "sampler_name": (samplers, {"default": "euler" if "euler" in samplers else samplers[0]}),
        "scheduler": (schedulers, {"default": "simple" if "simple" in schedulers else schedulers[0]}),
        "denoise": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01}),
    }
