"""Picture models whose latent ``[B, C, H, W]`` tells the grid, with text in front of the picture, behind it or apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from dit_accel.adapter import GeometryFn
from dit_accel.geometry import TokenGeometry
from dit_accel_patches.family import Family, Size
from dit_accel_patches.readers import Call, latent_grid, token_count

__all__ = ["AURAFLOW", "COGVIEW", "ERNIE", "GLM", "HUNYUAN_DIT", "HUNYUAN_IMAGE", "PIXART", "PRX", "SD3"]

_1K, _2K = Size("1024×1024", (1, 64, 64)), Size("2048×2048", (1, 128, 128))


def _picture(*, front: Callable[[Call], int] | None = None, behind: Callable[[Call], int] | None = None) -> GeometryFn:
    """Geometry of a picture with so many tokens in front and behind."""

    def geometry(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> TokenGeometry | str:
        call = Call(module, args, kwargs)
        patch = call.config.patch_size
        grid = latent_grid(call.tensor("hidden_states"), patch, patch)
        prefix, suffix = (0 if count is None else count(call) for count in (front, behind))
        return TokenGeometry(grid, prefix=prefix, suffix=suffix)

    return geometry


def _text(call: Call) -> int:
    return call.tensor("encoder_hidden_states").shape[1]


def _registers(call: Call) -> int:
    module: Any = call.module
    return int(module.register_tokens.shape[1])


def _hunyuan(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> TokenGeometry | str:
    call = Call(module, args, kwargs)
    text = token_count(call.get("encoder_hidden_states"))
    if getattr(module, "context_embedder_2", None) is not None:
        text += token_count(call.get("encoder_hidden_states_2"))
    return TokenGeometry(latent_grid(call.tensor("hidden_states"), *call.config.patch_size), suffix=text)


def _glm(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> TokenGeometry | str:
    if Call(module, args, kwargs).get("kv_caches") is not None:
        return "keys of the reference pictures come from a cache"
    return _picture(front=_text)(module, args, kwargs)


SD3 = Family(
    name="sd3",
    models=("SD3Transformer2DModel",),
    blocks=("transformer_blocks",),
    attention=("attn",),
    geometry=_picture(behind=_text),
    task="image",
    note="Stable Diffusion 3 and 3.5",
    layout="picture | text",
    dense="the second attention of SD3.5 medium's blocks; blocks with an IP-Adapter",
    head_dim=(64,),
    sizes=(Size("1024×1024", (1, 64, 64), 333),),
)

HUNYUAN_IMAGE = Family(
    name="hunyuan_image",
    models=("HunyuanImageTransformer2DModel",),
    blocks=("transformer_blocks", "single_transformer_blocks"),
    attention=("attn",),
    geometry=_hunyuan,
    task="image",
    note="HunyuanImage 2.1 and its refiner",
    layout="picture | glyphs and text",
    dense="the token refiner of the text",
    sizes=(Size("2048×2048", (1, 64, 64), 1128),),
)

COGVIEW = Family(
    name="cogview",
    models=("CogView3PlusTransformer2DModel", "CogView4Transformer2DModel"),
    blocks=("transformer_blocks",),
    attention=("attn1",),
    geometry=_picture(front=_text),
    task="image",
    note="CogView3-Plus and CogView4; the mask of CogView4 adds to the scores and makes it dense",
    layout="text | picture",
    sizes=(Size("1024×1024", (1, 64, 64), 1024), Size("2048×2048", (1, 128, 128), 1024)),
)

GLM = Family(
    name="glm_image",
    models=("GlmImageTransformer2DModel",),
    blocks=("transformer_blocks",),
    attention=("attn1",),
    geometry=_glm,
    task="image",
    note="GLM-Image; dense while keys of reference pictures are cached",
    layout="text | picture",
    head_dim=(64,),
    sizes=(_1K,),
)

PIXART = Family(
    name="pixart",
    models=("PixArtTransformer2DModel", "DiTTransformer2DModel"),
    blocks=("transformer_blocks",),
    attention=("attn1",),
    geometry=_picture(),
    task="image",
    note="PixArt-α and Σ, DiT",
    layout="picture",
    dense="text cross-attention",
    cross=("attn2",),
    head_dim=(72,),
    sizes=(Size("DiT, 512×512", (1, 32, 32)), _1K, _2K),
)

HUNYUAN_DIT = Family(
    name="hunyuan_dit",
    models=("HunyuanDiT2DModel",),
    blocks=("blocks",),
    attention=("attn1",),
    geometry=_picture(),
    task="image",
    note="Hunyuan-DiT 1.1 and 1.2",
    layout="picture",
    dense="text cross-attention",
    cross=("attn2",),
    head_dim=(88,),
    sizes=(_1K,),
)

AURAFLOW = Family(
    name="auraflow",
    models=("AuraFlowTransformer2DModel",),
    blocks=("joint_transformer_blocks", "single_transformer_blocks"),
    attention=("attn",),
    geometry=_picture(front=lambda call: _registers(call) + _text(call)),
    task="image",
    note="AuraFlow",
    layout="registers and text | picture",
    head_dim=(256,),
    sizes=(Size("1024×1024", (1, 64, 64), 264),),
)

ERNIE = Family(
    name="ernie",
    models=("ErnieImageTransformer2DModel",),
    blocks=("layers",),
    attention=("self_attention",),
    geometry=_picture(behind=lambda call: call.tensor("text_bth").shape[1]),
    task="image",
    note="ERNIE-Image",
    layout="picture | text",
    sizes=(Size("1024×1024", (1, 64, 64), 512),),
)

PRX = Family(
    name="prx",
    models=("PRXTransformer2DModel",),
    blocks=("blocks",),
    attention=("attention",),
    geometry=_picture(),
    task="image",
    note="PRX; text is among the keys alone and is exact",
    layout="picture; keys text | picture",
    head_dim=(64,),
    sizes=(_1K,),
    calls="keys_in_front",
)
