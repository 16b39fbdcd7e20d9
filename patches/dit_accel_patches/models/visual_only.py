"""Video models whose self-attention sees visual tokens alone, on a latent ``[B, C, F, H, W]``: Cosmos, Allegro, Latte."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from dit_accel.geometry import TokenGeometry
from dit_accel_patches.family import Family, Size
from dit_accel_patches.readers import Call, latent_grid

__all__ = ["ALLEGRO", "COSMOS", "LATTE"]


def _cosmos(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> TokenGeometry | str:
    call = Call(module, args, kwargs)
    return TokenGeometry(latent_grid(call.tensor("hidden_states"), *call.config.patch_size))


def _allegro(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> TokenGeometry | str:
    call = Call(module, args, kwargs)
    config = call.config
    patches = (config.patch_size_t, config.patch_size, config.patch_size)
    return TokenGeometry(latent_grid(call.tensor("hidden_states"), *patches))


def _latte(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> TokenGeometry | str:
    call = Call(module, args, kwargs)
    patch = call.config.patch_size
    _, height, width = latent_grid(call.tensor("hidden_states"), 1, patch, patch)
    return TokenGeometry((1, height, width))


COSMOS = Family(
    name="cosmos",
    models=("CosmosTransformer3DModel",),
    blocks=("transformer_blocks",),
    attention=("attn1",),
    geometry=_cosmos,
    note="Cosmos 1, Predict 2, 2.5 and Transfer",
    dense="text cross-attention",
    cross=("attn2",),
    sizes=(
        Size("Cosmos 1, 704×1280, 121 frames", (16, 44, 80)),
        Size("Predict 2, 704×1280, 93 frames", (24, 44, 80)),
    ),
)

ALLEGRO = Family(
    name="allegro",
    models=("AllegroTransformer3DModel",),
    blocks=("transformer_blocks",),
    attention=("attn1",),
    geometry=_allegro,
    note="Allegro; a mask over the latent makes it dense",
    dense="text cross-attention",
    cross=("attn2",),
    head_dim=(96,),
    sizes=(Size("720×1280, 88 frames", (22, 45, 80)),),
)

LATTE = Family(
    name="latte",
    models=("LatteTransformer3DModel",),
    blocks=("transformer_blocks",),
    attention=("attn1",),
    geometry=_latte,
    note="Latte; each frame is a sequence of its own",
    layout="one frame",
    dense="attention along time, one sequence a pixel of few frames; text cross-attention",
    cross=("attn2",),
    head_dim=(72,),
    sizes=(Size("512×512, 16 frames", (1, 32, 32)),),
)
