"""EasyAnimate: text tokens of one or two encoders, then video tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from dit_accel.geometry import TokenGeometry
from dit_accel_patches.family import Family, Size
from dit_accel_patches.readers import Call, latent_grid, token_count

__all__ = ["ADAPTER"]


def _geometry(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> TokenGeometry | str:
    call = Call(module, args, kwargs)
    patch = call.config.patch_size
    grid = latent_grid(call.tensor("hidden_states"), 1, patch, patch)
    names = ("encoder_hidden_states", "encoder_hidden_states_t5")
    return TokenGeometry(grid, prefix=token_count(*(call.get(name) for name in names)))


ADAPTER = Family(
    name="easyanimate",
    models=("EasyAnimateTransformer3DModel",),
    blocks=("transformer_blocks",),
    attention=("attn1",),
    geometry=_geometry,
    note="EasyAnimate 5.1, text to video, inpaint and control",
    layout="text | video",
    head_dim=(64,),
    sizes=(Size("512×512, 49 frames", (13, 32, 32), 256), Size("1024×1024, 49 frames", (13, 64, 64), 256)),
)
