"""Tiny random pipelines, built without a download, and runs that record what reaches them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dit_accel.adapter import StepInfo
from dit_accel.geometry import TokenGeometry

diffusers = pytest.importorskip("diffusers")
# Tensors of a few numbers: threads only get into each other's way.
torch.set_num_threads(1)


@dataclass
class Call:
    layer: int
    shape: tuple[int, ...]
    step: StepInfo
    key_valid: Tensor | None


class RecordingRun:
    """An ``AttentionRun`` that writes down its calls and answers with dense attention, or with zeros."""

    def __init__(self, answer: str = "dense") -> None:
        self.answer = answer
        self.forwards: list[tuple[TokenGeometry | str, StepInfo]] = []
        self.calls: list[Call] = []
        self.declined: list[tuple[int, str]] = []
        self.resets = 0
        self.raise_at: int | None = None

    def begin_forward(self, geometry: TokenGeometry | str, step: StepInfo) -> None:
        self.forwards.append((geometry, step))

    def attend(self, query, key, value, *, layer, scale, key_valid, dense):  # type: ignore[no-untyped-def]
        if layer == self.raise_at:
            raise ZeroDivisionError("asked to fail")
        self.calls.append(Call(layer, tuple(query.shape), self.forwards[-1][1], key_valid))
        return dense(query, key, value) if self.answer == "dense" else torch.zeros_like(query)

    def decline(self, layer: int, reason: str) -> None:
        self.declined.append((layer, reason))

    def reset(self) -> None:
        self.resets += 1

    @property
    def steps(self) -> list[tuple[int | None, str]]:
        return [(step.step, step.branch) for _, step in self.forwards]

    @property
    def layers(self) -> list[int]:
        return [call.layer for call in self.calls]


def wan_transformer(layers: int = 2) -> nn.Module:
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=256,
        ffn_dim=32,
        num_layers=layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    ).eval()


def flux_transformer() -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    ).eval()


class Tiny:
    """A pipeline with everything that one call of it needs."""

    def __init__(self, pipe: Any, inputs: dict[str, Any], **defaults: Any) -> None:
        self.pipe = pipe
        self.inputs = inputs
        self.defaults = defaults
        pipe.set_progress_bar_config(disable=True)

    @property
    def model(self) -> nn.Module:
        return self.pipe.transformer

    def __call__(self, **overrides: Any) -> Tensor:
        arguments = {**self.defaults, **self.inputs, **overrides}
        generator = torch.Generator().manual_seed(0)
        out = self.pipe(generator=generator, output_type="latent", return_dict=False, **arguments)
        return out[0]


def _wan(two: bool = False) -> Tiny:
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    options: dict[str, Any] = {}
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    if two:
        options = {"transformer_2": wan_transformer(), "boundary_ratio": 0.875}
        scheduler = diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
    pipe = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, transformer=wan_transformer(), vae=vae, scheduler=scheduler, **options
    )
    inputs = {
        "prompt_embeds": torch.randn(1, 16, 32),
        "negative_prompt_embeds": torch.randn(1, 16, 32),
    }
    return Tiny(
        pipe, inputs, height=32, width=48, num_frames=9, num_inference_steps=4 if two else 2, guidance_scale=6.0
    )


def _flux() -> Tiny:
    vae = diffusers.AutoencoderKL(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0609,
        scaling_factor=1.5035,
    )
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=flux_transformer(),
    )
    inputs = {"prompt_embeds": torch.randn(1, 16, 32), "pooled_prompt_embeds": torch.randn(1, 32)}
    return Tiny(pipe, inputs, height=8, width=12, num_inference_steps=3)


@pytest.fixture
def wan() -> Tiny:
    return _wan()


@pytest.fixture
def wan22() -> Tiny:
    return _wan(two=True)


@pytest.fixture
def flux() -> Tiny:
    return _flux()


@pytest.fixture
def make_run() -> Callable[..., RecordingRun]:
    return RecordingRun


@pytest.fixture
def make_wan() -> Callable[..., nn.Module]:
    return wan_transformer


@pytest.fixture
def wan_inputs() -> dict[str, Tensor]:
    return {
        "hidden_states": torch.randn(1, 16, 3, 4, 6),
        "timestep": torch.tensor([900.0]),
        "encoder_hidden_states": torch.randn(1, 16, 32),
    }


@pytest.fixture
def processors() -> Callable[[nn.Module], dict[str, Any]]:
    def read(module: nn.Module) -> dict[str, Any]:
        return {n: m.processor for n, m in module.named_modules() if hasattr(m, "processor")}

    return read
