"""Mochi: video tokens, then the valid text tokens alone, one call a sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from dit_accel.geometry import TokenGeometry
from dit_accel_patches.family import Family, Size
from dit_accel_patches.readers import Call, PerTensor, latent_grid

__all__ = ["ADAPTER"]


def _longest(mask: Tensor) -> int:
    # The model itself waits for the device to gather the valid tokens.
    return int(mask.bool().sum(1).max())


_text = PerTensor(_longest)


def _geometry(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> TokenGeometry | str:
    call = Call(module, args, kwargs)
    patch = call.config.patch_size
    grid = latent_grid(call.tensor("hidden_states"), 1, patch, patch)
    return TokenGeometry(grid, suffix=_text(call.tensor("encoder_attention_mask")))


ADAPTER = Family(
    name="mochi",
    models=("MochiTransformer3DModel",),
    blocks=("transformer_blocks",),
    attention=("attn1",),
    geometry=_geometry,
    note="Mochi 1; samples of a batch have plans of their own",
    layout="video | text without padding",
    sizes=(Size("480×848, 163 frames", (28, 30, 53), 256),),
    calls="sample_by_sample",
)
