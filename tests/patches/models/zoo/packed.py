"""Tiny video transformers whose tokens come packed in one sequence, with index tensors."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from .video import noise


def minimax_h3() -> Any:
    """Text, a reference picture, sound, then video."""
    text, sound, reference, frames, height, width = 8, 6, 20, 3, 8, 10
    video = frames * height * width
    total = text + sound + reference + video
    model = diffusers.MiniMaxH3Transformer3DModel(
        num_attention_heads=2,
        attention_head_dim=128,
        hidden_size=48,
        num_layers=2,
        num_refiner_layers=1,
        ffn_dim=32,
        in_channels=4,
        audio_in_channels=6,
        text_dim=16,
        freq_dim=8,
        time_embed_hidden_dim=24,
        time_embed_dim=16,
        rope_freq_dim=16,
    )
    position = torch.zeros(total, 3)
    position[:, 0] = torch.arange(total)
    pictures = torch.cartesian_prod(torch.arange(frames), torch.arange(height), torch.arange(width)).float()
    position[-video:] = pictures + torch.tensor([100.0, 0, 0])
    position[text : text + reference] = torch.cartesian_prod(torch.arange(1), torch.arange(4), torch.arange(5)).float()
    tags = torch.zeros(total, dtype=torch.long)
    tags[:text] = 1
    tags[text + reference : -video] = 2
    steps = torch.zeros(total, dtype=torch.long)
    steps[text : text + reference] = 1
    call = {
        "hidden_states": noise(1, reference + video, 16),
        "audio_hidden_states": noise(1, sound, 6),
        "encoder_hidden_states": noise(1, text, 16),
        "timestep": torch.tensor([0.7, 0.3]),
        "timestep_indices": steps,
        "token_tags": tags,
        "position_ids": position,
        "video_indices": (tags == 0).nonzero().flatten(),
        "audio_indices": (tags == 2).nonzero().flatten(),
        "text_indices": (tags == 1).nonzero().flatten(),
    }
    return model, call


def cosmos3() -> Any:
    """Grouped heads, and keys of the prompt in front of those of the video."""
    prompt, frames, height, width = 6, 3, 8, 10
    total = prompt + frames * height * width
    model = diffusers.Cosmos3OmniTransformer(
        head_dim=128,
        hidden_size=32,
        intermediate_size=32,
        latent_channel=2,
        latent_patch_size=1,
        num_attention_heads=2,
        num_hidden_layers=2,
        num_key_value_heads=1,
        patch_latent_dim=2,
        rope_axes_dim=[24, 20, 20],
        vocab_size=32,
    )
    video = torch.arange(prompt, total)
    call = {
        "input_ids": torch.arange(prompt),
        "text_indexes": torch.arange(prompt),
        "position_ids": torch.arange(total).expand(3, -1),
        "und_len": prompt,
        "sequence_length": total,
        "vision_tokens": [noise(1, 2, frames, height, width)],
        "vision_token_shapes": [(frames, height, width)],
        "vision_sequence_indexes": video,
        "vision_mse_loss_indexes": video,
        "vision_timesteps": torch.ones(len(video)),
        "vision_noisy_frame_indexes": [torch.arange(frames)],
    }
    return model, call
