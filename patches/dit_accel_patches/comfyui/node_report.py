"""Nodes that show what was computed and what it cost."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dit_accel_patches.comfyui.comparison import compare
from dit_accel_patches.comfyui.node_accelerate import CATEGORY
from dit_accel_patches.comfyui.patching import session_of
from dit_accel_patches.comfyui.picture import density_picture
from dit_accel_patches.comfyui.sampling import Sampling, sampler_inputs

__all__ = ["CompareWithDense", "Statistics"]


class Statistics:
    """What the latest run of an accelerated model computed."""

    CATEGORY = CATEGORY
    FUNCTION = "report"
    OUTPUT_NODE = True
    RETURN_TYPES = ("STRING", "IMAGE")
    RETURN_NAMES = ("text", "density")
    DESCRIPTION = (
        "What the latest sampling with this model computed, and why the rest stayed dense. The picture has a row for each "
        "layer and a column for each head (dark: few blocks computed, yellow: all), and a bar for each step below."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Inputs as ComfyUI wants them."""
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "From Accelerate Attention (dit_accel)."}),
                "after": ("LATENT", {"tooltip": "The sampler's output, so that this node runs after it."}),
            }
        }

    @classmethod
    def IS_CHANGED(cls, **_: Any) -> float:
        """Always: the statistics are those of the latest run."""
        return float("nan")

    def report(self, model: Any, after: Any) -> dict[str, Any]:
        """Text and picture.

        Raises:
            ValueError: if the model is not accelerated.
        """
        statuses = session_of(model).status()
        text = "\n".join(map(str, statuses)) or "no sampling has run with this model yet"
        return {"ui": {"text": [text]}, "result": (text, density_picture(statuses))}


class CompareWithDense:
    """Two samplings from the same noise, and their difference."""

    CATEGORY = CATEGORY
    FUNCTION = "compare"
    OUTPUT_NODE = True
    RETURN_TYPES = ("IMAGE", "IMAGE", "IMAGE", "STRING")
    RETURN_NAMES = ("accelerated", "dense", "difference", "report")
    DESCRIPTION = "Samples densely and accelerated from the same noise; gives both, their difference, PSNR and times."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Inputs as ComfyUI wants them."""
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "From Accelerate Attention (dit_accel)."}),
                "vae": ("VAE",),
                **sampler_inputs(),
                "gain": (
                    "FLOAT",
                    {
                        "default": 8.0,
                        "min": 1.0,
                        "max": 100.0,
                        "step": 1.0,
                        "tooltip": "Factor of the difference picture.",
                    },
                ),
            }
        }

    def compare(self, model: Any, vae: Any, gain: float, **sampling: Any) -> dict[str, Any]:
        """Sample twice and compare.

        Raises:
            ValueError: if the model is not accelerated.
        """
        found = compare(model, vae, Sampling(**sampling), gain)
        result: tuple[Tensor, Tensor, Tensor, str] = (found.accelerated, found.dense, found.difference, found.report)
        return {"ui": {"text": [found.report]}, "result": result}
