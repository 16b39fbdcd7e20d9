"""The node that people came for: Accelerate Attention."""

from __future__ import annotations

import logging
from typing import Any, ClassVar

from dit_accel.logging import get_logger
from dit_accel.presets import load_methods
from dit_accel_patches.comfyui.families import find_family
from dit_accel_patches.comfyui.patching import accelerate, decelerate
from dit_accel_patches.comfyui.profile import Profile
from dit_accel_patches.comfyui.settings import BLOCK_SIZES, PRECISIONS, QUALITIES, Settings, parse_blocks

__all__ = ["CATEGORY", "PROFILE", "AccelerateAttention", "method_inputs"]

CATEGORY = "model/patch"
PROFILE = "DITACCEL_PROFILE"

_logger = get_logger("dit_accel.comfyui")


def method_inputs(static: bool = False) -> dict[str, Any]:
    """Declarations of method, quality and density for ``INPUT_TYPES``."""
    methods = [name for name, method in load_methods().items() if not static or method.static]
    default = "auto" if "auto" in methods else methods[0]
    return {
        "method": (
            methods,
            {
                "default": default,
                "tooltip": "auto is the one to begin with: a token order for each head, blocks by the error that skipping "
                "them would leave, and what is skipped still counts by its mean. The others are published methods, for "
                "comparison. 'paro' and 'sta_search' need a profile from Calibrate.",
            },
        ),
        "quality": (
            list(QUALITIES),
            {
                "default": "balanced",
                "tooltip": "Share of the attention blocks computed exactly on a sparse step: fast 0.10, balanced 0.20, "
                "high 0.35; with auto on average, more at first and fewer later. 'method' takes the method's own "
                "default, 'custom' the density below.",
            },
        ),
        "density": (
            "FLOAT",
            {
                "default": 0.2,
                "min": 0.01,
                "max": 1.0,
                "step": 0.01,
                "tooltip": "For quality 'custom'. 0.2 computes a fifth of the blocks; 1.0 computes all of them.",
            },
        ),
    }


class AccelerateAttention:
    """MODEL in, MODEL out: sparse self-attention between start and end of the schedule."""

    CATEGORY = CATEGORY
    FUNCTION = "patch"
    RETURN_TYPES = ("MODEL",)
    DESCRIPTION = (
        "Sparse self-attention for video and image transformers (Wan, HunyuanVideo, LTX, Cosmos, FLUX, Chroma, Qwen-Image, "
        "Lumina 2, Z-Image, HiDream, AuraFlow). What cannot be sparse runs through the attention that is set otherwise, "
        "and the log says once why."
    )
    SEARCH_ALIASES: ClassVar[list[str]] = ["sparse attention", "block sparse", "dit_accel"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Inputs as ComfyUI wants them."""
        return {
            "required": {
                "model": ("MODEL",),
                **method_inputs(),
                "precision": (
                    list(PRECISIONS),
                    {
                        "default": "model",
                        "tooltip": "Type of queries, keys and values in sparse attention. 'model' leaves them as they are; "
                        "float32 models gain much from bfloat16. int8 and int8_fp8 multiply in 8 bits, with an error where "
                        "the GPU cannot; auto does where it can, and leaves attention heads that suffer as they are.",
                    },
                ),
                "start_percent": _percent(
                    0.2, "Attention is dense before this part of the schedule: 0.2 is the first fifth."
                ),
                "end_percent": _percent(1.0, "Attention is dense again behind this part of the schedule."),
                "dense_blocks": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": "Blocks that stay dense, such as '0, 1, 47-49'. FLUX: 0-18 are double ones, 19-56 "
                        "single ones.",
                    },
                ),
                "min_tokens": (
                    "INT",
                    {
                        "default": 4096,
                        "min": 0,
                        "max": 1 << 20,
                        "step": 256,
                        "tooltip": "Shorter sequences stay dense. 1024x1024 of FLUX are 4,096 image tokens, 81 frames of "
                        "Wan at 720p are 75,600.",
                    },
                ),
                "block_size": (
                    list(BLOCK_SIZES),
                    {
                        "default": "auto",
                        "tooltip": "Tokens per block of the sparse kernel. auto: 128 where the Hopper "
                        "kernel runs, else the method's own.",
                    },
                ),
                "verbose": (
                    "BOOLEAN",
                    {"default": False, "tooltip": "Log sizes and, after each run, what was computed."},
                ),
            },
            "optional": {
                "profile": (PROFILE, {"tooltip": "Its settings replace the ones above, verbose excepted."}),
                "dense_if_unsupported": (
                    "BOOLEAN",
                    {
                        "default": False,
                        "tooltip": "What to do with a model that cannot be accelerated: stop with a message, or keep it "
                        "dense and say so in the log.",
                    },
                ),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls,
        start_percent: float | None = None,
        end_percent: float | None = None,
        dense_blocks: str | None = None,
    ) -> bool | str:
        """Say before anything is loaded what is wrong with the values; linked inputs come as ``None``."""
        try:
            parse_blocks(dense_blocks or "")
            if start_percent is not None and end_percent is not None:
                Settings(start_percent=start_percent, end_percent=end_percent)
        except ValueError as error:
            return str(error)
        return True

    def patch(
        self,
        model: Any,
        method: str,
        quality: str,
        density: float,
        precision: str,
        start_percent: float,
        end_percent: float,
        dense_blocks: str,
        min_tokens: int,
        block_size: str,
        verbose: bool,
        profile: Profile | None = None,
        dense_if_unsupported: bool = False,
    ) -> tuple[Any]:
        """Patch a clone of the model.

        Raises:
            ValueError: if a value, the profile or the model does not fit; the message says what to change.
        """
        family = find_family(model.get_model_object("diffusion_model"))
        if isinstance(family, str) and dense_if_unsupported:
            _logger.log(logging.WARNING, "%s; it stays dense", family)
            return (decelerate(model),)
        settings = Settings(
            method=method,
            quality=quality,
            density=density,
            precision=precision,
            start_percent=start_percent,
            end_percent=end_percent,
            dense_blocks=parse_blocks(dense_blocks),
            min_tokens=min_tokens,
            block_size=block_size,
        )
        if profile is None:
            return (accelerate(model, settings, verbose=verbose),)
        if not isinstance(family, str):
            profile.check(type(model.get_model_object("diffusion_model")).__name__, family.twins)
        return (accelerate(model, profile.settings, plan=profile.plan, verbose=verbose),)


def _percent(default: float, tooltip: str) -> tuple[str, dict[str, Any]]:
    return "FLOAT", {"default": default, "min": 0.0, "max": 1.0, "step": 0.01, "tooltip": tooltip}
