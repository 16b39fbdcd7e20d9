"""LTX-Video and LTX-2: packed video tokens; their grid comes as arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from dit_accel.geometry import TokenGeometry
from dit_accel_patches.family import Family, Size
from dit_accel_patches.readers import Call

__all__ = ["ADAPTER"]


def _geometry(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> TokenGeometry | str:
    call = Call(module, args, kwargs)
    tokens = call.tensor("hidden_states").shape[1]
    sizes = [call.get(name) for name in ("num_frames", "height", "width")]
    if any(size is None for size in sizes):
        # Given coordinates say more than a grid can, conditioning frames in front among it.
        return TokenGeometry.flat(tokens)
    frames, height, width = (int(size) for size in sizes)
    behind = tokens - frames * height * width
    return TokenGeometry((frames, height, width), suffix=behind) if behind >= 0 else TokenGeometry.flat(tokens)


ADAPTER = Family(
    name="ltx",
    models=("LTXVideoTransformer3DModel", "LTX2VideoTransformer3DModel"),
    blocks=("transformer_blocks",),
    attention=("attn1",),
    geometry=_geometry,
    note="LTX-Video and the video stream of LTX-2; without a grid among the arguments on one axis",
    layout="video (conditioning tokens behind)",
    dense="text cross-attention; in LTX-2 the sound, attention between sound and video, and masked self-attention",
    cross=("attn2",),
    head_dim=(64, 128),
    sizes=(
        Size("LTX, 704×1216, 121 frames", (16, 22, 38)),
        Size("LTX-2, 512×768, 121 frames", (16, 16, 24)),
    ),
)
