"""Run the VAE over a whole clip in one call, for training.

`AutoencoderKLWan` encodes four frames and decodes one latent frame at a time, with caches between the
calls. All its convolutions are causal, so one call over the clip gives the same result; only the two
resampling layers that change the frame rate need the code below. It is several times faster.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, patchify, unpatchify


def _spatial(layer: WanResample, x: torch.Tensor) -> torch.Tensor:
    batch, _, time, _, _ = x.shape
    x = layer.resample(x.transpose(1, 2).flatten(0, 1))
    return x.unflatten(0, (batch, time)).transpose(1, 2)


def _double(layer: WanResample, x: torch.Tensor) -> torch.Tensor:
    """Make two frames of every latent frame but the first."""
    first, rest = x[:, :, :1], x[:, :, 1:]
    if rest.shape[2] == 0:
        return first
    both = layer.time_conv(rest).unflatten(1, (2, -1))
    return torch.cat([first, torch.stack(both.unbind(1), 3).flatten(2, 3)], 2)


def _forward(layer: WanResample, x: torch.Tensor, feat_cache: Any = None, feat_idx: Any = None) -> torch.Tensor:
    if feat_cache is not None:
        return WanResample.forward(layer, x, feat_cache, feat_idx)
    if layer.mode == "upsample3d":
        return _spatial(layer, _double(layer, x))
    x = _spatial(layer, x)
    if layer.mode == "downsample3d" and x.shape[2] > 1:
        x = torch.cat([x[:, :, :1], layer.time_conv(x)], 2)
    return x


def allow_whole_clips(vae: AutoencoderKLWan) -> None:
    """Let the resampling layers work without a cache; calls with a cache do what they did."""
    for module in vae.modules():
        if isinstance(module, WanResample):
            module.forward = MethodType(_forward, module)


def encode_moments(vae: AutoencoderKLWan, clips: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log-variance of the latents of whole clips."""
    mean, log_var = vae.quant_conv(vae.encoder(patchify(clips, vae.config.patch_size))).chunk(2, 1)
    return mean, log_var.clamp(-30.0, 20.0)


def decode_unclamped(vae: AutoencoderKLWan, z: torch.Tensor) -> torch.Tensor:
    """Decode whole clips; without the clamp, gradients live on where white overshoots."""
    return unpatchify(vae.decoder(vae.post_quant_conv(z), first_chunk=True), vae.config.patch_size)
