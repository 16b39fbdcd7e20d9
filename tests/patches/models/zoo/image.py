"""Tiny image transformers with random weights, and arguments for one forward call of each: families like FLUX."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor

from .video import NEW, lengths, noise

TEXT = 12


def ids(height: int, width: int, image: int = 0, columns: int = 3) -> Tensor:
    """Position ids ``[S, columns]``: which picture, row, column."""
    table = torch.zeros(height, width, columns)
    table[..., 0] = image
    table[..., 1] = torch.arange(height)[:, None]
    table[..., 2] = torch.arange(width)[None]
    return table.view(-1, columns)


FLUX = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 128,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": [16, 56, 56],
}


def _flux_call(*, tokens: int = 240, batch: int = 1, img_ids: Tensor | None = None, **more: Any) -> dict[str, Any]:
    return {
        "hidden_states": noise(batch, tokens, 4),
        "encoder_hidden_states": noise(batch, TEXT, 16),
        "timestep": torch.full((batch,), 0.9),
        "img_ids": ids(12, 20) if img_ids is None else img_ids,
        "txt_ids": torch.zeros(TEXT, 3),
        **more,
    }


def flux() -> Any:
    model = diffusers.FluxTransformer2DModel(**FLUX, pooled_projection_dim=8)
    return model, _flux_call(batch=2, pooled_projections=noise(2, 8))


def flux_kontext() -> Any:
    """A reference picture of another size behind the picture."""
    model = diffusers.FluxTransformer2DModel(**FLUX, pooled_projection_dim=8)
    both = torch.cat([ids(12, 20), ids(5, 7, image=1)])
    return model, _flux_call(tokens=275, img_ids=both, pooled_projections=noise(1, 8))


def flux_fill() -> Any:
    """The picture to fill and its mask come as channels."""
    model = diffusers.FluxTransformer2DModel(
        **{**FLUX, "in_channels": 12}, out_channels=4, pooled_projection_dim=8, guidance_embeds=True
    )
    more = {"hidden_states": noise(1, 240, 12), "guidance": torch.tensor([30.0])}
    return model, _flux_call(pooled_projections=noise(1, 8), **more)


def flux2() -> Any:
    options = {**FLUX, "axes_dims_rope": (32, 32, 32, 32), "timestep_guidance_channels": 16, "mlp_ratio": 2.0}
    both = torch.cat([ids(12, 20, columns=4), ids(5, 7, image=10, columns=4)])
    more = {"txt_ids": torch.zeros(TEXT, 4), "guidance": torch.tensor([4.0])}
    return diffusers.Flux2Transformer2DModel(**options), _flux_call(tokens=275, img_ids=both, **more)


def flux3() -> Any:
    model = diffusers.Flux3Transformer2DModel(
        in_channels=4,
        cond_in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=128,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_channels=16,
        mlp_ratio=2.0,
    )
    more = {
        "txt_ids": torch.zeros(TEXT, 4),
        "image_cond_hidden_states": noise(1, 35, 4),
        "image_cond_ids": ids(5, 7, image=1, columns=4),
    }
    return model, _flux_call(img_ids=ids(12, 20, columns=4), **more)


def chroma(mask: Any = None) -> Any:
    model = diffusers.ChromaTransformer2DModel(
        **FLUX, approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1
    )
    return model, _flux_call(batch=2, attention_mask=mask)


def chroma_masked() -> Any:
    """Boolean masks of text without its padding, which each block makes into ``[B, 1, S, S]``."""
    return chroma(torch.cat([lengths(TEXT, 12, 5).bool(), torch.ones(2, 240).bool()], dim=1))


def bria() -> Any:
    model = diffusers.BriaTransformer2DModel(**FLUX)
    return model, _flux_call()


def bria_fibo() -> Any:
    model = diffusers.BriaFiboTransformer2DModel(**FLUX, text_encoder_dim=16)
    return model, _flux_call(text_encoder_layers=[noise(1, TEXT, 16), noise(1, TEXT, 16)])


def longcat() -> Any:
    model = diffusers.LongCatImageTransformer2DModel(**FLUX, pooled_projection_dim=8)
    return model, _flux_call()


def ovis() -> Any:
    return diffusers.OvisImageTransformer2DModel(**FLUX), _flux_call()


def krea2() -> Any:
    model = diffusers.Krea2Transformer2DModel(
        in_channels=4,
        num_layers=2,
        attention_head_dim=128,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_hidden_dim=16,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
    )
    call = {
        "hidden_states": noise(2, 240, 4),
        "encoder_hidden_states": noise(2, TEXT, 2, 16),
        "timestep": torch.tensor([0.9, 0.9]),
        "position_ids": torch.cat([torch.zeros(TEXT, 3), ids(12, 20)]),
        "encoder_attention_mask": lengths(TEXT, 12, 5).bool(),
    }
    return model, call


QWEN = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 128,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
}


def qwenimage() -> Any:
    """Two prompts of different lengths, padded."""
    call = {
        "hidden_states": noise(2, 240, 16),
        "encoder_hidden_states": noise(2, TEXT, 16),
        "encoder_hidden_states_mask": lengths(TEXT, 12, 5).bool(),
        "timestep": torch.tensor([0.9, 0.9]),
        "img_shapes": [[(1, 12, 20)]] * 2,
    }
    return diffusers.QwenImageTransformer2DModel(**QWEN), call if NEW else {**call, "txt_seq_lens": [TEXT, 5]}


def qwenimage_edit() -> Any:
    """A reference picture of another size behind the picture, whose tokens are known to be clean."""
    call = {
        "hidden_states": noise(1, 275, 16),
        "encoder_hidden_states": noise(1, TEXT, 16),
        "encoder_hidden_states_mask": None,
        "timestep": torch.tensor([0.9]),
        "img_shapes": [[(1, 12, 20), (1, 5, 7)]],
    }
    if not NEW:
        return diffusers.QwenImageTransformer2DModel(**QWEN), {**call, "txt_seq_lens": [TEXT]}
    return diffusers.QwenImageTransformer2DModel(**QWEN, zero_cond_t=True), call


def nucleus() -> Any:
    model = diffusers.NucleusMoEImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=128,
        num_attention_heads=2,
        num_key_value_heads=1,
        joint_attention_dim=16,
        mlp_ratio=2.0,
        moe_enabled=False,
        capacity_factors=[1.0, 1.0],
    )
    call = {
        "hidden_states": noise(2, 240, 16),
        "img_shapes": [(1, 12, 20)] * 2,
        "encoder_hidden_states": noise(2, TEXT, 16),
        "encoder_hidden_states_mask": lengths(TEXT, 12, 5).bool(),
        "timestep": torch.tensor([0.9, 0.9]),
    }
    return model, call


def joyimage() -> Any:
    """Two pictures of one size in one sequence."""
    return _joy("JoyImageEditTransformer3DModel"), {
        "hidden_states": noise(1, 2, 4, 1, 16, 20),
        "encoder_hidden_states": noise(1, TEXT, 16),
        "timestep": torch.tensor([900.0]),
    }


def joyimage_plus() -> Any:
    """A picture and a reference of another size."""
    return _joy("JoyImageEditPlusTransformer3DModel"), {
        "hidden_states": noise(1, 275, 4, 1, 2, 2),
        "encoder_hidden_states": noise(1, TEXT, 16),
        "encoder_hidden_states_mask": lengths(TEXT, 9),
        "timestep": torch.tensor([900.0]),
        "shape_list": [[(1, 12, 20), (1, 5, 7)]],
    }


def _joy(name: str) -> Any:
    return getattr(diffusers, name)(
        patch_size=[1, 2, 2],
        in_channels=4,
        hidden_size=256,
        num_attention_heads=2,
        text_dim=16,
        mlp_width_ratio=1.0,
        num_layers=2,
        rope_dim_list=[16, 56, 56],
    )
