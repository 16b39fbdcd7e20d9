"""A tiny random Wan pipeline, and a driven browser."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="session")
def pipe() -> Any:
    """Wan with random weights: 2 layers of 2 heads, 5 x 8 x 8 = 320 tokens for 17 frames of 128 x 128 pixels."""
    torch.manual_seed(0)
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=64,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=64,
        ffn_dim=64,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
    ).eval()
    vae = diffusers.AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    made = diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        transformer=transformer,
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="session")
def call() -> dict[str, Any]:
    """Arguments of a pipeline call that ends after 5 steps."""
    gen = torch.Generator().manual_seed(1)
    positive, negative = (torch.randn(1, 16, 32, generator=gen) for _ in range(2))
    return {
        "prompt_embeds": positive,
        "negative_prompt_embeds": negative,
        "height": 128,
        "width": 128,
        "num_frames": 17,
        "num_inference_steps": 5,
        "guidance_scale": 4.0,
        "output_type": "latent",
    }


def _browser_fixtures() -> tuple[Any, Any, Any]:
    """Those of browser.py: with importlib mode, test folders cannot import each other."""
    spec = importlib.util.spec_from_file_location("driven_browser", Path(__file__).parents[1] / "report" / "browser.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.browser, module.open_page, module.until


browser, open_page, until = _browser_fixtures()
