"""Whole pipelines around the tiny transformers: scheduler, guidance and prompts as a user has them, latents out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import nn

from .video import NEW, lengths, noise

EULER = diffusers.FlowMatchEulerDiscreteScheduler
TWO_STEPS = {"num_inference_steps": 3, "output_type": "latent", "return_dict": False}


def _image_vae(channels: int, **more: Any) -> Any:
    return diffusers.AutoencoderKL(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=1,
        shift_factor=0.06,
        scaling_factor=1.5,
        **more,
    )


def _without_text(cls: Any, *more: str, **parts: Any) -> Any:
    """A pipeline without text encoders."""
    missing = dict.fromkeys(("text_encoder", "tokenizer", *more))
    return cls(**missing, **parts)


def cogvideox(model: nn.Module) -> tuple[Any, dict[str, Any]]:
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    pipe = _without_text(
        diffusers.CogVideoXPipeline, vae=vae, transformer=model, scheduler=diffusers.CogVideoXDDIMScheduler()
    )
    call = {"prompt_embeds": noise(1, 12, 16), "negative_prompt_embeds": noise(1, 12, 16) / 2}
    return pipe, {**call, "height": 128, "width": 160, "num_frames": 9}


def hunyuan_video(model: nn.Module) -> tuple[Any, dict[str, Any]]:
    """True guidance with prompts of different lengths, one call each."""
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )
    more = ("text_encoder_2", "tokenizer_2")
    pipe = _without_text(diffusers.HunyuanVideoPipeline, *more, transformer=model, vae=vae, scheduler=EULER(shift=7.0))
    call = {
        "prompt_embeds": noise(1, 12, 16),
        "pooled_prompt_embeds": noise(1, 8),
        "prompt_attention_mask": lengths(12, 9),
        "negative_prompt_embeds": noise(1, 12, 16) / 2,
        "negative_pooled_prompt_embeds": noise(1, 8) / 2,
        "negative_prompt_attention_mask": lengths(12, 3),
        "true_cfg_scale": 4.0,
    }
    return pipe, {**call, "height": 128, "width": 160, "num_frames": 9}


def ltx(model: nn.Module) -> tuple[Any, dict[str, Any]]:
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        encoder_causal=True,
        decoder_causal=False,
    )
    pipe = _without_text(diffusers.LTXPipeline, scheduler=EULER(), vae=vae, transformer=model)
    call = {
        "prompt_embeds": noise(1, 8, 16),
        "prompt_attention_mask": lengths(8, 8),
        "negative_prompt_embeds": noise(1, 8, 16) / 2,
        "negative_prompt_attention_mask": lengths(8, 3),
    }
    return pipe, {**call, "height": 256, "width": 320, "num_frames": 17}


def mochi(model: nn.Module) -> tuple[Any, dict[str, Any]]:
    """Guidance in one batch whose prompts have 2 and 9 tokens."""
    vae = diffusers.AutoencoderKLMochi(
        latent_channels=4,
        out_channels=3,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    pipe = _without_text(diffusers.MochiPipeline, scheduler=EULER(), vae=vae, transformer=model)
    call = {
        "prompt_embeds": noise(1, 12, 16),
        "prompt_attention_mask": lengths(12, 9).bool(),
        "negative_prompt_embeds": noise(1, 12, 16) / 2,
        "negative_prompt_attention_mask": lengths(12, 2).bool(),
    }
    return pipe, {**call, "height": 128, "width": 160, "num_frames": 13}


def sd3(model: nn.Module) -> tuple[Any, dict[str, Any]]:
    more = ("text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    pipe = _without_text(
        diffusers.StableDiffusion3Pipeline, *more, transformer=model, scheduler=EULER(), vae=_image_vae(4)
    )
    call = {
        "prompt_embeds": noise(1, 12, 16),
        "negative_prompt_embeds": noise(1, 12, 16) / 2,
        "pooled_prompt_embeds": noise(1, 8),
        "negative_pooled_prompt_embeds": noise(1, 8) / 2,
    }
    return pipe, {**call, "height": 24, "width": 40}


def qwenimage(model: nn.Module) -> tuple[Any, dict[str, Any]]:
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    pipe = _without_text(diffusers.QwenImagePipeline, scheduler=EULER(), vae=vae, transformer=model)
    call = {
        "prompt_embeds": noise(1, 12, 16),
        "prompt_embeds_mask": lengths(12, 12).bool(),
        "negative_prompt_embeds": noise(1, 12, 16) / 2,
        "negative_prompt_embeds_mask": lengths(12, 5 if NEW else 12).bool(),
        "true_cfg_scale": 4.0,
    }
    return pipe, {**call, "height": 192, "width": 320}


def dit(model: nn.Module) -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.DiTPipeline(transformer=model, vae=_image_vae(4), scheduler=diffusers.DDIMScheduler())
    return pipe, {"class_labels": [1], "output_type": "np"}


def zimage(model: nn.Module) -> tuple[Any, dict[str, Any]]:
    pipe = _without_text(diffusers.ZImagePipeline, scheduler=EULER(), vae=_image_vae(4), transformer=model)
    call = {"prompt_embeds": [noise(12, 16)], "negative_prompt_embeds": [noise(40, 16)], "guidance_scale": 4.0}
    return pipe, {**call, "height": 48, "width": 80}


def lumina2(model: nn.Module) -> tuple[Any, dict[str, Any]]:
    pipe = _without_text(diffusers.Lumina2Pipeline, scheduler=EULER(), vae=_image_vae(4), transformer=model)
    call = {
        "prompt_embeds": noise(1, 12, 16),
        "prompt_attention_mask": lengths(12, 9),
        "negative_prompt_embeds": noise(1, 12, 16) / 2,
        "negative_prompt_attention_mask": lengths(12, 4),
    }
    return pipe, {**call, "height": 192, "width": 320}


def flux_kontext(model: nn.Module) -> tuple[Any, dict[str, Any]]:
    """A picture to edit stands behind the picture."""
    more = ("text_encoder_2", "tokenizer_2")
    pipe = _without_text(diffusers.FluxKontextPipeline, *more, scheduler=EULER(), vae=_image_vae(1), transformer=model)
    call = {"image": torch.rand(1, 3, 24, 40), "prompt_embeds": noise(1, 12, 16), "pooled_prompt_embeds": noise(1, 8)}
    return pipe, {**call, "height": 24, "width": 40, "max_area": 24 * 40, "_auto_resize": False}


PIPELINES: dict[str, Callable[[nn.Module], tuple[Any, dict[str, Any]]]] = {
    maker.__name__: maker
    for maker in (cogvideox, hunyuan_video, ltx, mochi, sd3, qwenimage, dit, zimage, lumina2, flux_kontext)
}


def wan_ti2v_5b(model: nn.Module) -> tuple[Any, dict[str, Any]]:
    """The timestep of every token on its own."""
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    pipe = _without_text(
        diffusers.WanPipeline, transformer=model, vae=vae, scheduler=EULER(shift=7.0), expand_timesteps=True
    )
    call = {"prompt_embeds": noise(1, 8, 16), "negative_prompt_embeds": noise(1, 8, 16) / 2, "guidance_scale": 5.0}
    return pipe, {**call, "height": 128, "width": 160, "num_frames": 9}


def flux2(model: nn.Module) -> tuple[Any, dict[str, Any]]:
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(4,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=1,
    )
    pipe = _without_text(diffusers.Flux2Pipeline, scheduler=EULER(), vae=vae, transformer=model)
    return pipe, {"prompt_embeds": noise(1, 12, 16), "height": 24, "width": 40}


def chroma(model: nn.Module) -> tuple[Any, dict[str, Any]]:
    """Hands on a mask of numbers."""
    pipe = _without_text(diffusers.ChromaPipeline, scheduler=EULER(), vae=_image_vae(1), transformer=model)
    call = {
        "prompt_embeds": noise(1, 12, 16),
        "prompt_attention_mask": lengths(12, 5).float(),
        "negative_prompt_embeds": noise(1, 12, 16) / 2,
        "negative_prompt_attention_mask": lengths(12, 3).float(),
    }
    return pipe, {**call, "height": 24, "width": 40}


def kandinsky5(model: nn.Module) -> tuple[Any, dict[str, Any]]:
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )
    more = ("text_encoder_2", "tokenizer_2")
    pipe = _without_text(diffusers.Kandinsky5T2VPipeline, *more, transformer=model, vae=vae, scheduler=EULER())
    ends = torch.tensor([0, 8])
    call = {
        "prompt_embeds_qwen": noise(1, 8, 16),
        "prompt_embeds_clip": noise(1, 8),
        "prompt_cu_seqlens": ends,
        "negative_prompt_embeds_qwen": noise(1, 8, 16) / 2,
        "negative_prompt_embeds_clip": noise(1, 8) / 2,
        "negative_prompt_cu_seqlens": ends,
    }
    return pipe, {**call, "height": 128, "width": 160, "num_frames": 9}


PIPELINES |= {"wan_ti2v_5b": wan_ti2v_5b, "flux2": flux2, "kandinsky5": kandinsky5}


def hunyuan_video15(model: nn.Module) -> tuple[Any, dict[str, Any]]:
    """Text alone: the tokens of the picture are padding."""
    vae = diffusers.AutoencoderKLHunyuanVideo15(latent_channels=4, block_out_channels=(32,) * 5, layers_per_block=1)
    more = ("text_encoder_2", "tokenizer_2")
    pipe = _without_text(
        diffusers.HunyuanVideo15Pipeline,
        *more,
        transformer=model,
        vae=vae,
        scheduler=EULER(shift=7.0),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=4.0),
    )
    call = {
        "prompt_embeds": noise(1, 12, 16),
        "prompt_embeds_mask": lengths(12, 9),
        "prompt_embeds_2": noise(1, 6, 8),
        "prompt_embeds_mask_2": lengths(6, 2),
        "negative_prompt_embeds": noise(1, 12, 16) / 2,
        "negative_prompt_embeds_mask": lengths(12, 3),
        "negative_prompt_embeds_2": noise(1, 6, 8) / 2,
        "negative_prompt_embeds_mask_2": lengths(6, 0),
    }
    return pipe, {**call, "height": 128, "width": 160, "num_frames": 9}


PIPELINES["hunyuan_video15"] = hunyuan_video15
