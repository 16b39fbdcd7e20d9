"""Tiny video transformers with random weights, and arguments for one forward call of each."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor

#: diffusers 0.42; the oldest that is supported knows fewer classes, and some of their arguments are others.
NEW = hasattr(diffusers, "Flux3Transformer2DModel")
WAN = {
    "num_attention_heads": 2,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 64,
}


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def lengths(total: int, *valid: int) -> Tensor:
    """Mask ``[B, total]`` of integers: the first ``valid`` of each sample."""
    return (torch.arange(total)[None] < torch.tensor(valid)[:, None]).long()


def _wan(name: str, *, channels: int = 4, batch: int = 1, inputs: dict[str, Any] | None = None, **more: Any) -> Any:
    model = getattr(diffusers, name)(**{**WAN, "attention_head_dim": 64, "in_channels": channels, **more})
    call = {
        "hidden_states": noise(batch, channels, 3, 16, 20),
        "timestep": torch.full((batch,), 900.0),
        "encoder_hidden_states": noise(batch, 8, 16),
    }
    return model, {**call, **(inputs or {})}


def wan() -> Any:
    return _wan("WanTransformer3DModel", batch=2, attention_head_dim=128)


def wan_i2v() -> Any:
    image = {"encoder_hidden_states_image": noise(1, 5, 16)}
    return _wan("WanTransformer3DModel", channels=12, image_dim=16, added_kv_proj_dim=128, inputs=image)


def wan_ti2v_5b() -> Any:
    """TI2V-5B tells the noise of each token: those of the given picture are clean."""
    model, call = _wan("WanTransformer3DModel")
    call["timestep"] = torch.cat([torch.zeros(1, 80), torch.full((1, 160), 900.0)], dim=1)
    return model, call


def wan_vace() -> Any:
    control = {"control_hidden_states": noise(1, 6, 3, 16, 20)}
    return _wan("WanVACETransformer3DModel", vace_layers=[0], vace_in_channels=6, inputs=control)


def wan_animate() -> Any:
    more: dict[str, Any] = {
        "latent_channels": 4,
        "image_dim": 16,
        "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
        "motion_encoder_size": 16,
        "motion_style_dim": 8,
        "motion_dim": 4,
        "motion_encoder_dim": 16,
        "face_encoder_hidden_dim": 16,
        "face_encoder_num_heads": 2,
        "inject_face_latents_blocks": 2,
    }
    inputs = {
        "encoder_hidden_states_image": noise(1, 5, 16),
        "pose_hidden_states": noise(1, 4, 2, 16, 20),
        "face_pixel_values": noise(1, 3, 5, 16, 16),
    }
    return _wan("WanAnimateTransformer3DModel", channels=12, inputs=inputs, **more)


def skyreels() -> Any:
    return _wan("SkyReelsV2Transformer3DModel")


def chronoedit() -> Any:
    return _wan("ChronoEditTransformer3DModel")


def anyflow() -> Any:
    inputs = {"hidden_states": noise(1, 3, 4, 16, 20), "timestep": torch.full((1, 3), 900.0)}
    return _wan("AnyFlowTransformer3DModel", inputs={**inputs, "r_timestep": torch.full((1, 3), 500.0)})


def helios() -> Any:
    more = {"rope_dim": (24, 20, 20)}
    inputs = {
        "indices_hidden_states": torch.arange(6, 9)[None].float(),
        "indices_latents_history_short": torch.tensor([[5.0]]),
        "indices_latents_history_mid": torch.tensor([[3.0, 4.0]]),
        "indices_latents_history_long": torch.arange(4)[None].float(),
        "latents_history_short": noise(1, 4, 1, 16, 20),
        "latents_history_mid": noise(1, 4, 2, 16, 20),
        "latents_history_long": noise(1, 4, 4, 16, 20),
    }
    options = {k: v for k, v in WAN.items() if k != "rope_max_seq_len"}
    model = diffusers.HeliosTransformer3DModel(**options, attention_head_dim=64, **more)
    _, call = _wan("WanTransformer3DModel", inputs=inputs)
    return model, call


HUNYUAN = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "patch_size_t": 1,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (16, 24, 24),
}


def _hunyuan(batch: int, valid: tuple[int, ...]) -> dict[str, Any]:
    return {
        "hidden_states": noise(batch, 4, 3, 16, 20),
        "timestep": torch.full((batch,), 900.0),
        "encoder_hidden_states": noise(batch, 12, 16),
        "encoder_attention_mask": lengths(12, *valid),
        "pooled_projections": noise(batch, 8),
    }


def hunyuan_video() -> Any:
    """Two prompts of different lengths, padded."""
    model = diffusers.HunyuanVideoTransformer3DModel(**HUNYUAN, guidance_embeds=True, patch_size=2)
    return model, {**_hunyuan(2, (12, 5)), "guidance": torch.full((2,), 6000.0)}


def hunyuan_video_i2v() -> Any:
    """Token replacement: the tokens of the first frame have a modulation of their own."""
    options = {**HUNYUAN, "guidance_embeds": False, "patch_size": 2, "image_condition_type": "token_replace"}
    return diffusers.HunyuanVideoTransformer3DModel(**options), _hunyuan(1, (7,))


def hunyuan_video15() -> Any:
    """The channels are those of the video, of the given picture and its mask."""
    options = {k: v for k, v in HUNYUAN.items() if k not in ("pooled_projection_dim", "num_single_layers")}
    options |= {
        "num_layers": 2,
        "patch_size": 1,
        "text_embed_2_dim": 8,
        "image_embed_dim": 8,
        "attention_head_dim": 128,
    }
    options |= {"rope_axes_dim": (32, 48, 48), "in_channels": 9}
    call = {k: v for k, v in _hunyuan(2, (12, 5)).items() if k != "pooled_projections"}
    call["hidden_states"] = noise(2, 9, 3, 8, 10)
    call |= {
        "encoder_hidden_states_2": noise(2, 6, 8),
        "encoder_attention_mask_2": lengths(6, 3, 6),
        "image_embeds": noise(2, 4, 8),
    }
    return diffusers.HunyuanVideo15Transformer3DModel(**options), call


def framepack() -> Any:
    more = {"has_image_proj": True, "image_proj_dim": 8, "has_clean_x_embedder": True, "patch_size": 2}
    model = diffusers.HunyuanVideoFramepackTransformer3DModel(**HUNYUAN, **more)
    call = {
        **_hunyuan(1, (7,)),
        "image_embeds": noise(1, 4, 8),
        "guidance": torch.full((1,), 6000.0),
        "indices_latents": torch.arange(8, 11),
        "latents_clean": noise(1, 4, 2, 16, 20),
        "indices_latents_clean": torch.tensor([0, 7]),
        "latents_history_2x": noise(1, 4, 2, 16, 20),
        "indices_latents_history_2x": torch.tensor([5, 6]),
        "latents_history_4x": noise(1, 4, 4, 16, 20),
        "indices_latents_history_4x": torch.arange(1, 5),
    }
    return model, call


COGVIDEO = {
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 16,
    "num_layers": 2,
    "sample_width": 20,
    "sample_height": 16,
    "sample_frames": 9,
    "patch_size": 2,
    "max_text_seq_length": 12,
}


def _cogvideo(channels: int = 4, frames: int = 3) -> dict[str, Any]:
    return {
        "hidden_states": noise(2, frames, channels, 16, 20),
        "timestep": torch.tensor([900, 900]),
        "encoder_hidden_states": noise(2, 12, 16),
    }


def cogvideox() -> Any:
    """Classifier-free guidance in one batch, and RoPE, which a wrapper with another signature would lose."""
    angles = noise(240, 32).repeat_interleave(2, dim=1)
    call = {**_cogvideo(), "image_rotary_emb": (angles.cos(), angles.sin())}
    return diffusers.CogVideoXTransformer3DModel(**COGVIDEO, use_rotary_positional_embeddings=True), call


def cogvideox_i2v() -> Any:
    options = {**COGVIDEO, "in_channels": 8, "use_rotary_positional_embeddings": True}
    options["use_learned_positional_embeddings"] = True
    return diffusers.CogVideoXTransformer3DModel(**options), _cogvideo(channels=8)


def cogvideox15() -> Any:
    options = {**COGVIDEO, "patch_size_t": 2, "patch_bias": False, "use_rotary_positional_embeddings": True}
    return diffusers.CogVideoXTransformer3DModel(**options, ofs_embed_dim=8), {
        **_cogvideo(frames=4),
        "ofs": torch.tensor([2.0]),
    }


def consisid() -> Any:
    face = {
        "is_train_face": True,
        "cross_attn_interval": 1,
        "cross_attn_dim_head": 4,
        "cross_attn_num_heads": 1,
        "LFE_id_dim": 2,
        "LFE_vit_dim": 2,
        "LFE_depth": 5,
        "LFE_dim_head": 8,
        "LFE_num_heads": 2,
        "LFE_num_id_token": 1,
        "LFE_num_querie": 1,
        "LFE_output_dim": 85,
        "LFE_ff_mult": 1,
        "LFE_num_scale": 1,
    }
    call = {**_cogvideo(), "id_cond": noise(2, 2), "id_vit_hidden": [noise(2, 2, 2)]}
    return diffusers.ConsisIDTransformer3DModel(**{**COGVIDEO, **face}), call
