"""FLUX.2, FLUX.3, Chroma, Bria, LongCat and Ovis: text tokens, then a picture whose position ids are an argument."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from dit_accel.geometry import TokenGeometry
from dit_accel_patches.family import Family, Size
from dit_accel_patches.readers import Call, ids_grid, token_count

__all__ = ["BRIA", "CHROMA", "FLUX2", "FLUX3"]

_SIZES = (Size("1024×1024", (1, 64, 64), 512), Size("2048×2048", (1, 128, 128), 512))


def _geometry(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> TokenGeometry | str:
    call = Call(module, args, kwargs)
    return ids_grid(call.tensor("img_ids"), call.tensor("encoder_hidden_states").shape[1])


def _flux2(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> TokenGeometry | str:
    call = Call(module, args, kwargs)
    if call.get("kv_cache_mode") is not None:
        return "keys of the reference pictures come from a cache"
    return _geometry(module, args, kwargs)


def _flux3(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> TokenGeometry | str:
    call = Call(module, args, kwargs)
    found = ids_grid(call.tensor("img_ids"), call.tensor("encoder_hidden_states").shape[1])
    if isinstance(found, str):
        return found
    behind = found.suffix + token_count(call.get("image_cond_hidden_states"))
    return TokenGeometry(found.grid, prefix=found.prefix, suffix=behind)


FLUX2 = Family(
    name="flux2",
    models=("Flux2Transformer2DModel",),
    blocks=("transformer_blocks", "single_transformer_blocks"),
    attention=("attn",),
    geometry=_flux2,
    task="image",
    note="FLUX.2 dev and klein, with reference pictures; dense while klein caches their keys",
    layout="text | picture (references behind)",
    sizes=_SIZES,
)

FLUX3 = Family(
    name="flux3",
    models=("Flux3Transformer2DModel",),
    blocks=("single_transformer_blocks",),
    attention=("attn",),
    geometry=_flux3,
    task="image",
    note="FLUX.3",
    layout="text | picture (condition behind)",
    dense="the blocks in front, where text, picture and condition do not see each other",
    sizes=_SIZES,
)

CHROMA = Family(
    name="chroma",
    models=("ChromaTransformer2DModel",),
    blocks=("transformer_blocks", "single_transformer_blocks"),
    attention=("attn",),
    geometry=_geometry,
    task="image",
    note="Chroma; the floating-point mask of diffusers' pipeline adds to the scores instead of hiding, and makes it dense",
    layout="text | picture",
    sizes=_SIZES,
    outer_mask=True,
)

BRIA = Family(
    name="bria",
    models=(
        "BriaTransformer2DModel",
        "BriaFiboTransformer2DModel",
        "LongCatImageTransformer2DModel",
        "OvisImageTransformer2DModel",
    ),
    blocks=("transformer_blocks", "single_transformer_blocks"),
    attention=("attn",),
    geometry=_geometry,
    task="image",
    note="Bria 3.2, Bria FIBO, LongCat-Image and Edit, Ovis-Image",
    layout="text | picture (references behind)",
    sizes=_SIZES,
    outer_mask=True,
)
