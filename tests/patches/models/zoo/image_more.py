"""More tiny image transformers: those with a latent ``[B, C, H, W]``, and any others."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from .image import TEXT
from .video import NEW, lengths, noise


def picture(batch: int = 2, channels: int = 4, **more: Any) -> dict[str, Any]:
    return {
        "hidden_states": noise(batch, channels, 24, 40),
        "encoder_hidden_states": noise(batch, TEXT, 16),
        "timestep": torch.full((batch,), 900.0),
        **more,
    }


SD3 = {
    "sample_size": 64,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 64,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "caption_projection_dim": 128,
    "pooled_projection_dim": 8,
    "pos_embed_max_size": 64,
}


def sd3() -> Any:
    return diffusers.SD3Transformer2DModel(**SD3), picture(pooled_projections=noise(2, 8))


def sd35_medium() -> Any:
    """A second attention, of the picture alone, in the first block."""
    model = diffusers.SD3Transformer2DModel(**SD3, dual_attention_layers=(0,), qk_norm="rms_norm")
    return model, picture(pooled_projections=noise(2, 8))


def hunyuan_image() -> Any:
    model = diffusers.HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=128,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=(1, 1),
        text_embed_dim=16,
        text_embed_2_dim=8,
    )
    call = {
        "hidden_states": noise(2, 4, 12, 20),
        "timestep": torch.tensor([900.0, 900.0]),
        "encoder_hidden_states": noise(2, TEXT, 16),
        "encoder_attention_mask": lengths(TEXT, 12, 5),
        "encoder_hidden_states_2": noise(2, 6, 8),
        "encoder_attention_mask_2": lengths(6, 2, 6),
    }
    return model, call


COGVIEW = {
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 128,
    "num_attention_heads": 2,
    "text_embed_dim": 16,
    "time_embed_dim": 8,
    "condition_dim": 4,
    "sample_size": 64,
    "pos_embed_max_size": 64,
}
SIZES = {
    "original_size": torch.full((2, 2), 320.0),
    "target_size": torch.full((2, 2), 320.0),
    "crop_coords": torch.zeros(2, 2),
}


def cogview3plus() -> Any:
    return diffusers.CogView3PlusTransformer2DModel(**COGVIEW), picture(**SIZES)


def cogview4() -> Any:
    return diffusers.CogView4Transformer2DModel(**COGVIEW, rope_axes_dim=(32, 32)), picture(**SIZES)


def glm_image() -> Any:
    options = {k: v for k, v in COGVIEW.items() if k not in ("sample_size", "pos_embed_max_size")}
    model = diffusers.GlmImageTransformer2DModel(**options, prior_vq_quantizer_codebook_size=16)
    call = picture(target_size=SIZES["target_size"], crop_coords=SIZES["crop_coords"])
    call |= {
        "prior_token_id": torch.zeros(2, 240, dtype=torch.long),
        "prior_token_drop": torch.zeros(2, 240, dtype=torch.bool),
    }
    return model, call


def pixart() -> Any:
    model = diffusers.PixArtTransformer2DModel(
        sample_size=32,
        num_layers=2,
        patch_size=2,
        attention_head_dim=72,
        num_attention_heads=2,
        in_channels=4,
        cross_attention_dim=144,
        caption_channels=16,
        use_additional_conditions=False,
    )
    added = {"resolution": None, "aspect_ratio": None}
    return model, picture(added_cond_kwargs=added, encoder_attention_mask=lengths(TEXT, 12, 5))


def dit() -> Any:
    model = diffusers.DiTTransformer2DModel(
        sample_size=32,
        num_layers=2,
        patch_size=2,
        attention_head_dim=72,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
    )
    call = {
        "hidden_states": noise(2, 4, 32, 32),
        "timestep": torch.tensor([900, 900]),
        "class_labels": torch.tensor([1, 1000]),
    }
    return model, call


def hunyuan_dit() -> Any:
    model = diffusers.HunyuanDiT2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=88,
        num_attention_heads=2,
        hidden_size=176,
        cross_attention_dim=16,
        cross_attention_dim_t5=8,
        pooled_projection_dim=8,
        text_len=4,
        text_len_t5=4,
        activation_fn="gelu-approximate",
        use_style_cond_and_image_meta_size=False,
    )
    angles = noise(256, 44).repeat_interleave(2, dim=1)
    call = {
        "hidden_states": noise(2, 4, 32, 32),
        "timestep": torch.tensor([900.0, 900.0]),
        "encoder_hidden_states": noise(2, 4, 16),
        "text_embedding_mask": torch.ones(2, 4),
        "encoder_hidden_states_t5": noise(2, 4, 8),
        "text_embedding_mask_t5": torch.ones(2, 4),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }
    return model, call


def auraflow() -> Any:
    model = diffusers.AuraFlowTransformer2DModel(
        sample_size=32,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=256,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=512,
        pos_embed_max_size=1024,
    )
    return model, picture(timestep=torch.tensor([0.9, 0.9]))


def ernie() -> Any:
    model = diffusers.ErnieImageTransformer2DModel(
        hidden_size=256,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=32,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        text_in_dim=16,
    )
    call = {
        "hidden_states": noise(2, 4, 24, 40),
        "timestep": torch.tensor([900.0, 900.0]),
        "text_bth": noise(2, TEXT, 16),
        "text_lens": torch.tensor([12, 5]),
    }
    return model, call


def prx() -> Any:
    model = diffusers.PRXTransformer2DModel(
        in_channels=4,
        patch_size=2,
        context_in_dim=16,
        hidden_size=128,
        mlp_ratio=1.0,
        num_heads=2,
        depth=2,
        axes_dim=[32, 32],
    )
    return model, picture(
        timestep=torch.tensor([0.9, 0.9]), attention_mask=lengths(TEXT, 12, 5).bool() if NEW else None
    )
