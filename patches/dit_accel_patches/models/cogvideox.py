"""CogVideoX and ConsisID: text tokens, then video tokens, through ``F.scaled_dot_product_attention``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from dit_accel.geometry import TokenGeometry
from dit_accel_patches.family import Family, Size
from dit_accel_patches.readers import Call, latent_grid

__all__ = ["ADAPTER"]


def _geometry(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> TokenGeometry | str:
    call = Call(module, args, kwargs)
    config = call.config
    patches = (getattr(config, "patch_size_t", None) or 1, config.patch_size, config.patch_size)
    # Frames come before channels: [B, F, C, H, W].
    grid = latent_grid(call.tensor("hidden_states"), *patches, axes=(1, 3, 4))
    return TokenGeometry(grid, prefix=call.tensor("encoder_hidden_states").shape[1])


ADAPTER = Family(
    name="cogvideox",
    models=("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel"),
    blocks=("transformer_blocks",),
    attention=("attn1",),
    geometry=_geometry,
    note="CogVideoX 2B, 5B and 1.5, text and image to video, Fun; ConsisID",
    layout="text | video",
    dense="the face modules of ConsisID",
    head_dim=(64,),
    sizes=(
        Size("5B, 480×720, 49 frames", (13, 30, 45), 226),
        Size("1.5 5B, 768×1360, 81 frames", (11, 48, 85), 226),
    ),
)
