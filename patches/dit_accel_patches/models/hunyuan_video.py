"""HunyuanVideo, its image-to-video form, and FramePack: video tokens, then text that ends in padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from dit_accel.geometry import TokenGeometry
from dit_accel_patches.family import Family, Size
from dit_accel_patches.readers import Call, latent_grid

__all__ = ["ADAPTER", "FRAMEPACK"]


def _patches(config: Any) -> tuple[int, int, int]:
    return config.patch_size_t, config.patch_size, config.patch_size


def _geometry(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> TokenGeometry | str:
    call = Call(module, args, kwargs)
    grid = latent_grid(call.tensor("hidden_states"), *_patches(call.config))
    return TokenGeometry(grid, suffix=call.tensor("encoder_hidden_states").shape[1])


def _history(latents: Tensor | None, indices: Tensor | None, kernel: tuple[int, int, int]) -> int:
    """Tokens of clean or older frames, which are padded to whole patches of ``kernel``."""
    if latents is None or indices is None:
        return 0
    frames, height, width = (-(-size // patch) for size, patch in zip(latents.shape[2:], kernel, strict=True))
    return frames * height * width


def _framepack(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> TokenGeometry | str:
    call = Call(module, args, kwargs)
    patch = _patches(call.config)
    before = _history(call.get("latents_clean"), call.get("indices_latents_clean"), patch)
    before += _history(call.get("latents_history_2x"), call.get("indices_latents_history_2x"), (2, 4, 4))
    before += _history(call.get("latents_history_4x"), call.get("indices_latents_history_4x"), (4, 8, 8))
    return TokenGeometry(latent_grid(call.tensor("hidden_states"), *patch), prefix=before)


ADAPTER = Family(
    name="hunyuan_video",
    models=("HunyuanVideoTransformer3DModel",),
    blocks=("transformer_blocks", "single_transformer_blocks"),
    attention=("attn",),
    geometry=_geometry,
    note="HunyuanVideo text to video and both forms of image to video",
    layout="video | text",
    dense="the token refiner of the text",
    sizes=(
        Size("720p, 129 frames", (33, 45, 80), 256),
        Size("544×960, 129 frames", (33, 34, 60), 256),
    ),
)

FRAMEPACK = Family(
    name="framepack",
    models=("HunyuanVideoFramepackTransformer3DModel",),
    blocks=("transformer_blocks", "single_transformer_blocks"),
    attention=("attn",),
    geometry=_framepack,
    note="FramePack and FramePack-F1; frames of the past are exact",
    layout="past | video | picture and text",
    dense="the token refiner of the text",
    sizes=(Size("640×640, a section of 33 frames", (9, 40, 40), 5000),),
    # One prompt is cut to its own length, which the mask knows and not its shape.
    calls="elastic",
)
