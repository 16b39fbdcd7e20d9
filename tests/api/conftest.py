"""A tiny random Wan pipeline with an attention sequence long enough to have blocks: 5 x 8 x 8 = 320 tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

diffusers = pytest.importorskip("diffusers")


def transformer(layers: int = 2) -> Any:
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=64,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=64,
        ffn_dim=64,
        num_layers=layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
    ).eval()


@pytest.fixture
def pipe() -> Any:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    made = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, transformer=transformer(), vae=vae, scheduler=scheduler
    )
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def generate(pipe: Any) -> Callable[..., Tensor]:
    """Run the pipeline to latents; the same seed every time."""
    gen = torch.Generator().manual_seed(1)
    positive, negative = (torch.randn(1, 16, 32, generator=gen) for _ in range(2))

    def call(steps: int = 5, batch: int = 1, target: Any = None, **options: Any) -> Tensor:
        options.pop("prompt", None)
        frames = (target or pipe)(
            prompt_embeds=positive.expand(batch, -1, -1).to(pipe.device, pipe.dtype),
            negative_prompt_embeds=negative.expand(batch, -1, -1).to(pipe.device, pipe.dtype),
            height=128,
            width=128,
            num_frames=17,
            num_inference_steps=steps,
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            **options,
        ).frames
        assert isinstance(frames, Tensor)
        return frames

    return call
