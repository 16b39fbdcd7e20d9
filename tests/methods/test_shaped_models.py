"""Every preset runs on random models of the shape of FLUX, an image behind text, and of HunyuanVideo, with padded text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import dit_accel
from dit_accel.presets import get_method, load_methods

diffusers = pytest.importorskip("diffusers")

#: Static plans need a calibration and trained scorers a file; see test_tiny_wan.py.
NAMES = sorted(
    name
    for name, method in load_methods().items()
    if not (method.is_dense or method.static or "learned" in method.score)
)
STEPS = 4
Run = Callable[[], Tensor]


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _run(pipe: Any, **call: Any) -> Run:
    pipe.set_progress_bar_config(disable=True)

    def once() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        made = pipe(**call, num_inference_steps=STEPS, generator=generator, output_type="latent", return_dict=False)[0]
        assert isinstance(made, Tensor)
        return made

    return once


def _flux() -> tuple[Any, Run, str]:
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
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
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), latent_channels=1, norm_num_groups=1, sample_size=32)
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=model,
    )
    call = {"prompt_embeds": _noise(1, 40, 32), "pooled_prompt_embeds": _noise(1, 32)}
    return pipe, _run(pipe, **call, height=48, width=56), "1x24x28 (+40 text)"


def _hunyuan() -> tuple[Any, Run, str]:
    torch.manual_seed(0)
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
        guidance_embeds=True,
        patch_size=2,
    ).eval()
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )
    pipe = diffusers.HunyuanVideoPipeline(
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=model,
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    )
    mask = (torch.arange(20) < 13)[None].long()
    call = {"prompt_embeds": _noise(1, 20, 16), "pooled_prompt_embeds": _noise(1, 8), "prompt_attention_mask": mask}
    return pipe, _run(pipe, **call, height=160, width=192, num_frames=17), "5x10x12 (+20 text behind)"


@pytest.fixture(scope="module", params=[_flux, _hunyuan], ids=["flux", "hunyuan_video"])
def shaped(request: pytest.FixtureRequest) -> tuple[Any, Run, str, Tensor]:
    pipe, run, geometry = request.param()
    return pipe, run, geometry, run()


@pytest.mark.parametrize("name", NAMES)
def test_preset_runs_and_says_what_it_is_made_of(name: str, shaped: tuple[Any, Run, str, Tensor]) -> None:
    pipe, run, geometry, dense = shaped
    with dit_accel.enabled(pipe, name, density=0.4, min_tokens=0, warmup=0.25) as handle:
        sparse = run()
        (status,) = handle.stats().values()
    assert torch.isfinite(sparse).all()
    assert status.geometry == geometry
    assert status.sparse_calls > 0, status.reasons
    assert status.sparse_density < 1.0
    assert not torch.equal(sparse, dense)
    told = str(get_method(name))
    assert all(slot in told for slot in ("order", "score", "selection", "remainder", "blocks", "schedule"))
    assert torch.equal(run(), dense)  # gone without a trace
