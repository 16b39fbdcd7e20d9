"""Wan 2.1 and 2.2 and the models that share its blocks: self-attention sees the visual tokens alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from dit_accel.geometry import TokenGeometry
from dit_accel_patches.arguments import argument
from dit_accel_patches.family import Family, Size

__all__ = ["ADAPTER"]


def _geometry(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> TokenGeometry | str:
    latent = argument(module, args, kwargs, "hidden_states")
    shape = tuple(getattr(latent, "shape", ()))
    if len(shape) != 5:
        return f"hidden_states must be [B, C, F, H, W], got {shape}"
    config: Any = module.config
    frames, height, width = (size // patch for size, patch in zip(shape[2:], config.patch_size, strict=True))
    return TokenGeometry(grid=(frames, height, width))


ADAPTER = Family(
    name="wan",
    models=(
        "WanTransformer3DModel",
        "WanVACETransformer3DModel",
        "WanAnimateTransformer3DModel",
        "SkyReelsV2Transformer3DModel",
        "ChronoEditTransformer3DModel",
    ),
    blocks=("blocks", "vace_blocks"),
    attention=("attn1",),
    geometry=_geometry,
    task="video",
    cross=("attn2",),
    note="Wan 2.1 and 2.2 T2V, I2V and TI2V, VACE, Animate, SkyReels-V2, ChronoEdit",
    layout="video",
    dense="text and picture cross-attention; the face adapter of Animate; causal masks of SkyReels-V2",
    sizes=(
        Size("1.3B and 14B, 480p, 81 frames", (21, 30, 52)),
        Size("14B, 720p, 81 frames", (21, 45, 80)),
        Size("TI2V-5B, 704×1280, 121 frames", (31, 22, 40)),
        Size("SkyReels-V2, 540p, 97 frames", (25, 34, 60)),
    ),
)
