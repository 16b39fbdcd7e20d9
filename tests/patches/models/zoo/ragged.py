"""Tiny image transformers that put sequences of different lengths together."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from .image_more import picture
from .video import lengths, noise


def _zimage(*captions: int) -> Any:
    model = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=256, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16
    )
    call = {
        "x": [noise(4, 1, 24, 40) for _ in captions],
        "t": torch.full((len(captions),), 0.1),
        "cap_feats": [noise(length, 16) for length in captions],
    }
    return model, call


def zimage() -> Any:
    return _zimage(12)


def zimage_ragged() -> Any:
    """Captions of different lengths in one batch."""
    return _zimage(12, 40)


def lumina2() -> Any:
    model = diffusers.Lumina2Transformer2DModel(
        sample_size=40,
        patch_size=2,
        in_channels=4,
        hidden_size=192,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        cap_feat_dim=16,
    )
    return model, picture(timestep=torch.tensor([0.1, 0.1]), encoder_attention_mask=lengths(12, 9, 9))


def hidream(width: int = 32) -> Any:
    model = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=128,
        num_attention_heads=2,
        caption_channels=[8, 16],
        text_emb_dim=8,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(64, 32, 32),
        max_resolution=(32, 32),
        llama_layers=(0, 1),
        force_inference_output=True,
    )
    call = {
        "hidden_states": noise(1, 4, 32, width),
        "encoder_hidden_states_t5": noise(1, 6, 8),
        "encoder_hidden_states_llama3": noise(2, 1, 5, 16),
        "pooled_embeds": noise(1, 8),
        "timesteps": torch.tensor([900]),
    }
    return model, call


def hidream_oblong() -> Any:
    """A picture that is no square is filled up to the largest one."""
    return hidream(width=24)


def bria_fibo2() -> Any:
    """Served by the generic adapter."""
    model = diffusers.BriaFibo2Transformer2DModel(
        in_channels=4,
        patch_size=2,
        dim=128,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=24,
        injection_layer_ids=(1,),
        perceiver_num_layers=1,
        min_num_gist_tokens=4,
        max_num_gist_tokens=8,
        gist_step=4,
        gist_min_text_len=4,
        gist_max_text_len=16,
        axes_dims=(16, 24, 24),
        axes_lens=(32, 32, 32),
    )
    call = {
        "hidden_states": noise(1, 4, 24, 40),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": noise(1, 2, 6, 24),
    }
    return model, call
