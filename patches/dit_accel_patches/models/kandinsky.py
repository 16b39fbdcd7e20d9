"""Kandinsky 5 and 6: video tokens alone, latents with channels last ``[B, F, H, W, C]``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from dit_accel.geometry import TokenGeometry
from dit_accel_patches.family import Family, Size
from dit_accel_patches.readers import Call, latent_grid

__all__ = ["ADAPTER", "KANDINSKY6"]


def _geometry(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> TokenGeometry | str:
    call = Call(module, args, kwargs)
    if call.get("sparse_params") is not None:
        return "the model brings sparse attention of its own (sparse_params, NABLA)"
    return TokenGeometry(latent_grid(call.tensor("hidden_states"), *call.config.patch_size, axes=(1, 2, 3)))


ADAPTER = Family(
    name="kandinsky5",
    models=("Kandinsky5Transformer3DModel",),
    blocks=("visual_transformer_blocks",),
    attention=("self_attention",),
    geometry=_geometry,
    note="Kandinsky 5 Lite and Pro, video and image; checkpoints with NABLA keep their own sparse attention",
    dense="the text blocks; text cross-attention",
    cross=("cross_attention",),
    head_dim=(64, 128),
    sizes=(Size("Lite, 512×768, 5 s", (31, 32, 48)),),
)

KANDINSKY6 = Family(
    name="kandinsky6",
    models=("Kandinsky6Transformer3DModel",),
    blocks=("visual_transformer_blocks",),
    attention=("video_dec_block.self_attention",),
    geometry=_geometry,
    note="the video stream of Kandinsky 6",
    dense="the audio stream, attention between the streams, text blocks and text cross-attention",
    head_dim=(128,),
)
