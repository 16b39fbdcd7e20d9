"""Helios and AnyFlow: Wan's blocks over other sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from dit_accel.geometry import TokenGeometry
from dit_accel_patches.family import Family, Size
from dit_accel_patches.readers import Call, latent_grid

__all__ = ["ANYFLOW", "HELIOS"]


def _ceil_tokens(latent: Tensor | None, indices: Any, kernel: Sequence[int]) -> int:
    if latent is None or indices is None:
        return 0
    frames, height, width = (-(-size // patch) for size, patch in zip(latent.shape[2:], kernel, strict=True))
    return frames * height * width


def _helios(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> TokenGeometry | str:
    call = Call(module, args, kwargs)
    frames, height, width = call.config.patch_size
    past = 0
    for name, scale in (("short", 1), ("mid", 2), ("long", 4)):
        kernel = (frames * scale, height * scale, width * scale)
        past += _ceil_tokens(call.get(f"latents_history_{name}"), call.get(f"indices_latents_history_{name}"), kernel)
    return TokenGeometry(latent_grid(call.tensor("hidden_states"), frames, height, width), prefix=past)


def _anyflow(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> TokenGeometry | str:
    call = Call(module, args, kwargs)
    # Frames come before channels: [B, F, C, H, W].
    return TokenGeometry(latent_grid(call.tensor("hidden_states"), *call.config.patch_size, axes=(1, 3, 4)))


HELIOS = Family(
    name="helios",
    models=("HeliosTransformer3DModel",),
    blocks=("blocks",),
    attention=("attn1",),
    geometry=_helios,
    note="Helios; frames of the past are exact",
    layout="past | video",
    dense="text cross-attention",
    cross=("attn2",),
)

ANYFLOW = Family(
    name="anyflow",
    models=("AnyFlowTransformer3DModel",),
    blocks=("blocks",),
    attention=("attn1",),
    geometry=_anyflow,
    note="AnyFlow, bidirectional",
    dense="text cross-attention",
    cross=("attn2",),
    sizes=(Size("480p, 81 frames", (21, 30, 52)),),
)
