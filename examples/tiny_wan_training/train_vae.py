"""Train the VAE for a number of seconds, then encode the data set with it."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext

import torch
from diffusers import AutoencoderKLWan
from frames import FrameStore
from models import make_vae
from torch.nn import functional as F
from whole_clip import allow_whole_clips, decode_unclamped, encode_moments

KL_WEIGHT = 3e-4


def autocast(device: torch.device, enabled: bool = True) -> AbstractContextManager[None]:
    """Half precision where the device has it."""
    if device.type == "cuda" and enabled:
        return torch.autocast("cuda", torch.bfloat16)
    return nullcontext()


def vae_loss(vae: AutoencoderKLWan, clips: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Error of pixels and of their differences in space, and a little KL; also the mean square error."""
    mean, log_var = encode_moments(vae, clips)
    z = mean + (0.5 * log_var).exp() * torch.randn_like(mean)
    error = decode_unclamped(vae, z).float() - clips
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    mean, log_var = mean.float(), log_var.float()
    kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).mean()
    return error.abs().mean() + edges + KL_WEIGHT * kl, error.detach().square().mean()


def train_vae(
    store: FrameStore, seconds: float, lengths: tuple[int, ...] = (17, 65), frames: int = 130
) -> AutoencoderKLWan:
    """Train from scratch until the time is up; the learning rate falls to zero with it.

    Long windows are needed: the decoder looks back some 40 frames, and drifts beyond what it has seen.
    """
    vae = make_vae().to(store.device).train()
    allow_whole_clips(vae)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=1e-4)
    begin = time.time()
    step, progress, said = 0, 0.0, 0.0
    while progress < 1.0:
        rate = 2e-3 * min(1.0, (step + 1) / 200) * max(0.0, 1 - progress) ** 0.75
        for group in optimizer.param_groups:
            group["lr"] = rate
        length = lengths[step % len(lengths)]
        clips = store.sample(max(1, frames // length), length)
        with autocast(store.device):
            loss, mse = vae_loss(vae, clips)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 8 == 0:
            loss.item()  # keep the clock honest: let the device catch up
        progress = (time.time() - begin) / seconds
        if progress - said >= 0.1 or progress >= 1.0:
            said = progress
            psnr = -10 * torch.log10(mse / 4).item()
            print(f"vae {progress:4.0%} step {step} loss {loss.item():.4f} psnr {psnr:.1f}", flush=True)
    return vae.eval()


@torch.no_grad()
def encode_all(
    vae: AutoencoderKLWan, store: FrameStore, frames: int = 65, phases: int = 6, batch: int = 24
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode windows that start at `phases` points of every loop.

    Returns latents (windows, z, time, height, width), normalised by moments that are also written into
    the VAE's config, and the clip each window is of. The VAE is causal: a prefix of a window's latents is
    the latents of a shorter window.
    """
    count = len(store.lengths)
    clips = torch.arange(count, device=store.device).repeat_interleave(phases)
    phase = torch.arange(phases, device=store.device).repeat(count)
    starts = (store.lengths[clips] * phase).div(phases, rounding_mode="floor")
    parts = []
    for index in range(0, len(clips), batch):
        window = store.cut(clips[index : index + batch], starts[index : index + batch], frames)
        with autocast(store.device):
            parts.append(vae.encode(window).latent_dist.mean.float())
    latents = torch.cat(parts)
    mean = latents.mean((0, 2, 3, 4))
    std = latents.std((0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    latents = (latents - mean.view(1, -1, 1, 1, 1)) / std.view(1, -1, 1, 1, 1)
    return latents.to(torch.bfloat16 if store.device.type == "cuda" else torch.float32), clips


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKLWan, store: FrameStore, frames: int, batch: int = 8) -> float:
    """PSNR in dB of whole windows, decoded from the mean as a pipeline would, in single precision."""
    clips = store.sample(batch, frames)
    out = F.mse_loss(vae.decode(vae.encode(clips).latent_dist.mean).sample, clips) / 4
    return float(-10 * torch.log10(out))
