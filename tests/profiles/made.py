"""Profiles that nobody measured, and a tiny random pipeline that takes prompts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dit_accel.geometry import TokenGeometry
from dit_accel.method import Method
from dit_accel.profiles import ANY_BRANCH, ComponentProfile, ErrorCurve, Fingerprint, Profile
from dit_accel.targets import QualityCurve, QualityPoint

PRINT = Fingerprint("0123456789abcdef", "fedcba9876543210")


def make_component(parts: int = 2, layers: int = 3, heads: int = 2, **changes: Any) -> ComponentProfile:
    gen = torch.Generator().manual_seed(parts * 100 + layers * 10 + heads)
    shape = (parts, layers, heads)
    output = torch.rand(shape, generator=gen) + 0.1
    error = torch.rand(3, *shape, generator=gen).sort(0, descending=True).values
    fields: dict[str, Any] = {
        "model": "WanTransformer3DModel",
        "fingerprint": PRINT,
        "geometry": TokenGeometry((5, 8, 8), suffix=7),
        "layers": tuple(f"blocks.{i}.attn1" for i in range(layers)),
        "heads": heads,
        "starts": tuple(i / parts for i in range(parts)),
        "density": {ANY_BRANCH: torch.rand(shape, generator=gen).clamp(min=0.05), "uncond": torch.full(shape, 0.25)},
        "orders": tuple(("fhw", "hwf") * (heads // 2) + ("fhw",) * (heads % 2) for _ in range(layers)),
        "precision": ("method",) * layers,
        "dense_layers": (0,),
        "curve": ErrorCurve((0.1, 0.3, 0.6), error, output / output.sum(-1, keepdim=True)),
    }
    return ComponentProfile(**{**fields, **changes})


def make_profile(component: ComponentProfile | None = None, **changes: Any) -> Profile:
    fields: dict[str, Any] = {
        "method": Method(name="trial", order="axes", order_choice="recall", compensate="mean"),
        "components": {"transformer": component or make_component()},
        "target": "psnr:35",
        "error": 0.05,
        "task": "video",
        "steps": 20,
        "curve": QualityCurve((QualityPoint(0.1, 30.0, 0.4), QualityPoint(0.02, 40.0, 0.8)), "a test"),
        "measured": {"psnr": 34.9, "density": 0.6, "prompts": ["a cat", "ein Vögelchen"]},
        "made_on": {"gpu": "none", "versions": {"torch": "2.11"}},
        "name": "a test",
        "notes": ("made up",),
    }
    return Profile(**{**fields, **changes})


class Prompted:
    """A tiny random Wan pipeline whose text embeddings follow from the prompt."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.transformer, self.scheduler = pipe.transformer, pipe.scheduler
        self.seen: list[str] = []

    def __call__(self, prompt: str, **options: Any) -> Any:
        self.seen.append(prompt)
        gen = torch.Generator().manual_seed(sum(map(ord, prompt)))
        positive, negative = (torch.randn(1, 16, 32, generator=gen) for _ in range(2))
        asked = {"height": 128, "width": 128, "num_frames": 17, "num_inference_steps": 4, "guidance_scale": 4.0}
        noise = torch.Generator().manual_seed(0)
        options = {**asked, "output_type": "latent", "generator": noise, **options}
        return self.pipe(prompt_embeds=positive, negative_prompt_embeds=negative, **options)


def make_pipe(layers: int = 2, heads: int = 2) -> Prompted:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=heads,
        attention_head_dim=32,
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
    for name, weight in transformer.named_parameters():
        if "attn1.norm_q" in name:  # maps that are more peaked from head to head
            weight.data *= torch.linspace(1, 6, heads).repeat_interleave(32)
        if "attn1.to_out" in name or "attn1.to_v" in name:  # so that what is skipped can be seen
            weight.data *= 4
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, transformer=transformer, vae=vae, scheduler=scheduler
    )
    pipe.set_progress_bar_config(disable=True)
    return Prompted(pipe)
