"""Motif-Video: video tokens, then picture and text tokens with a mask of valid ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from dit_accel.geometry import TokenGeometry
from dit_accel_patches.family import Family
from dit_accel_patches.readers import Call, latent_grid, token_count

__all__ = ["ADAPTER"]


def _geometry(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> TokenGeometry | str:
    call = Call(module, args, kwargs)
    config = call.config
    grid = latent_grid(call.tensor("hidden_states"), config.patch_size_t, config.patch_size, config.patch_size)
    return TokenGeometry(grid, suffix=token_count(call.get("encoder_hidden_states"), call.get("image_embeds")))


ADAPTER = Family(
    name="motif",
    models=("MotifVideoTransformer3DModel",),
    blocks=("transformer_blocks", "single_transformer_blocks"),
    attention=("attn",),
    geometry=_geometry,
    note="Motif-Video text and image to video",
    layout="video | picture and text",
    dense="its additional text cross-attention; decoder layers, whose second stream is another video",
)
