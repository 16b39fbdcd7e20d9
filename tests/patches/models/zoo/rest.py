"""Tiny transformers whose attention is of another kind, and stays dense."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from .video import noise


def omnigen() -> Any:
    """Every call has a mask of its own for text, reference and picture."""
    model = diffusers.OmniGenTransformer2DModel(
        hidden_size=32,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        num_layers=2,
        pad_token_id=0,
        vocab_size=32,
        time_step_dim=8,
        rope_scaling={"long_factor": [1.0] * 8, "short_factor": [1.0] * 8},
    )
    total = 6 + 1 + 64
    call = {
        "hidden_states": noise(1, 4, 16, 16),
        "timestep": torch.tensor([0.5]),
        "input_ids": torch.ones(1, 6, dtype=torch.long),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": torch.ones(1, total, total),
        "position_ids": torch.arange(total)[None],
    }
    return model, call


def lumina_next() -> Any:
    model = diffusers.LuminaNextDiT2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=48,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=2,
        multiple_of=16,
        learn_sigma=False,
        cross_attention_dim=16,
    )
    call = {
        "hidden_states": noise(1, 4, 16, 16),
        "encoder_hidden_states": noise(1, 8, 16),
        "timestep": torch.tensor([0.5]),
        "encoder_mask": torch.ones(1, 8),
        "image_rotary_emb": torch.polar(torch.ones(32, 32, 12), noise(32, 32, 12)),
        "cross_attention_kwargs": {},
    }
    return model, call


def ideogram4() -> Any:
    """A mask of segments, several prompts packed in one sequence."""
    text, total = 6, 6 + 64
    model = diffusers.Ideogram4Transformer2DModel(
        in_channels=4,
        num_layers=2,
        attention_head_dim=64,
        num_attention_heads=2,
        intermediate_size=32,
        adaln_dim=16,
        llm_features_dim=16,
        mrope_section=(12, 10, 10),
    )
    from diffusers.models.transformers.transformer_ideogram4 import LLM_TOKEN_INDICATOR, OUTPUT_IMAGE_INDICATOR

    kind = torch.full((1, total), OUTPUT_IMAGE_INDICATOR)
    kind[:, :text] = LLM_TOKEN_INDICATOR
    call = {
        "hidden_states": noise(1, total, 4),
        "encoder_hidden_states": noise(1, total, 16),
        "timestep": torch.tensor([0.5]),
        "position_ids": torch.arange(total)[None, :, None].expand(1, total, 3),
        "segment_ids": torch.ones(1, total, dtype=torch.long),
        "indicator": kind,
    }
    return model, call


DENSE = {"omnigen": omnigen, "lumina_next": lumina_next, "ideogram4": ideogram4}
