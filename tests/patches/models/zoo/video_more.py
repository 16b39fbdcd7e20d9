"""More tiny video transformers: the families with one or two models."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from .video import lengths, noise


def ltx() -> Any:
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=64,
        cross_attention_dim=128,
        num_layers=2,
        caption_channels=16,
    )
    call = {
        "hidden_states": noise(2, 240, 4),
        "encoder_hidden_states": noise(2, 8, 16),
        "timestep": torch.full((2,), 900.0),
        "encoder_attention_mask": lengths(8, 8, 3),
        "num_frames": 3,
        "height": 8,
        "width": 10,
    }
    return model, call


def ltx2() -> Any:
    model = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=128,
        cross_attention_dim=256,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=2,
        caption_channels=16,
        rope_double_precision=False,
    )
    call = {
        "hidden_states": noise(1, 240, 4),
        "audio_hidden_states": noise(1, 9, 4),
        "encoder_hidden_states": noise(1, 8, 16),
        "audio_encoder_hidden_states": noise(1, 8, 16),
        "timestep": torch.tensor([900.0]),
        "encoder_attention_mask": torch.ones(1, 8).bool(),
        "num_frames": 3,
        "height": 8,
        "width": 10,
        "audio_num_frames": 9,
        "fps": 25.0,
    }
    return model, call


def mochi() -> Any:
    """Two prompts of different lengths: the model calls attention once for each."""
    model = diffusers.MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=128,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=16,
        max_sequence_length=12,
    )
    call = {
        "hidden_states": noise(2, 4, 3, 16, 20),
        "encoder_hidden_states": noise(2, 12, 16),
        "timestep": torch.tensor([900, 900]),
        "encoder_attention_mask": lengths(12, 4, 12).bool(),
    }
    return model, call


def cosmos() -> Any:
    model = diffusers.CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=128,
        num_layers=2,
        mlp_ratio=2,
        text_embed_dim=16,
        adaln_lora_dim=8,
        max_size=(4, 32, 32),
        concat_padding_mask=False,
    )
    call = {
        "hidden_states": noise(2, 4, 3, 16, 20),
        "timestep": torch.tensor([0.9, 0.9]),
        "encoder_hidden_states": noise(2, 8, 16),
        "attention_mask": lengths(8, 8, 3).bool(),
        "fps": 24,
    }
    return model, call


def allegro() -> Any:
    model = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=96,
        num_layers=2,
        cross_attention_dim=192,
        sample_width=20,
        sample_height=16,
        sample_frames=3,
        caption_channels=16,
    )
    call = {
        "hidden_states": noise(2, 4, 3, 16, 20),
        "encoder_hidden_states": noise(2, 8, 16),
        "encoder_attention_mask": lengths(8, 8, 3),
        "timestep": torch.tensor([900, 900]),
        "image_rotary_emb": _allegro_rope(3, 8, 10),
    }
    return model, call


def _allegro_rope(frames: int, height: int, width: int) -> Any:
    axes = (frames, height, width)
    grids = torch.cartesian_prod(*(torch.arange(n) for n in axes)).T[:, None, :]
    return tuple((noise(n, 32).cos(), noise(n, 32).sin()) for n in axes), tuple(grids.expand(3, 1, -1))


def latte() -> Any:
    model = diffusers.LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=72,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=144,
        attention_bias=True,
        sample_size=24,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=16,
        video_length=2,
    )
    call = {
        "hidden_states": noise(2, 4, 2, 24, 24),
        "timestep": torch.tensor([900, 900]),
        "encoder_hidden_states": noise(2, 8, 16),
    }
    return model, call


def easyanimate() -> Any:
    model = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=64,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        num_layers=2,
        mmdit_layers=1,
        time_embed_dim=8,
        text_embed_dim=16,
        time_position_encoding_type="3d_rope",
    )
    call = {
        "hidden_states": noise(2, 4, 3, 16, 20),
        "timestep": torch.tensor([900.0, 900.0]),
        "encoder_hidden_states": noise(2, 8, 16),
    }
    return model, call


KANDINSKY = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "in_text_dim": 16,
    "in_text_dim2": 8,
    "time_dim": 32,
    "num_text_blocks": 1,
    "num_visual_blocks": 2,
}


def kandinsky5() -> Any:
    model = diffusers.Kandinsky5Transformer3DModel(**KANDINSKY, model_dim=128, ff_dim=64)
    call = {
        "hidden_states": noise(2, 3, 16, 20, 4),
        "encoder_hidden_states": noise(2, 8, 16),
        "timestep": torch.tensor([900.0, 900.0]),
        "pooled_projections": noise(2, 8),
        "visual_rope_pos": [torch.arange(3), torch.arange(8), torch.arange(10)],
        "text_rope_pos": torch.arange(8),
    }
    return model, call


def kandinsky6() -> Any:
    model = diffusers.Kandinsky6Transformer3DModel(
        **KANDINSKY, model_dim=256, ff_dim=64, axes_dims=(32, 48, 48), visual_cond=True, in_audio_dim=4, out_audio_dim=4
    )
    call = {
        "hidden_states": noise(1, 3, 16, 20, 9),
        "encoder_hidden_states": noise(1, 8, 16),
        "pooled_projections": noise(1, 8),
        "timestep": torch.tensor([900.0]),
        "audio_hidden_states": noise(1, 6, 4),
    }
    return model, call


def motif() -> Any:
    model = diffusers.MotifVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=128,
        num_layers=1,
        num_single_layers=1,
        text_embed_dim=16,
        mlp_ratio=2,
    )
    call = {
        "hidden_states": noise(2, 4, 3, 16, 20),
        "timestep": torch.tensor([900, 900]),
        "encoder_hidden_states": noise(2, 8, 16),
        "encoder_attention_mask": lengths(8, 8, 3).bool(),
    }
    return model, call
