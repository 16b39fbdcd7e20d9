"""Train the VAE for a number of seconds, and measure it."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext

import torch
from diffusers import AutoencoderKL
from parts import make_vae
from torch import Tensor

KL_WEIGHT = 1e-3


def autocast(device: torch.device) -> AbstractContextManager[None]:
    """Half precision where the device has it."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def vae_loss(vae: AutoencoderKL, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Error of pixels and of their differences, and a little KL; also the mean square error."""
    mean, log_var = vae.encoder(pictures).float().chunk(2, 1)
    log_var = log_var.clamp(-30.0, 20.0)
    z = mean + (0.5 * log_var).exp() * torch.randn_like(mean)
    error = vae.decoder(z).float() - pictures
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).mean()
    return error.abs().mean() + edges + KL_WEIGHT * kl, error.detach().square().mean()


def fit_vae(
    pictures: list[Tensor], seconds: float, pixels: int = 8 * 256 * 256, start: AutoencoderKL | None = None
) -> AutoencoderKL:
    """Train until the time is up; the learning rate falls to zero with it.

    Args:
        pictures: uint8 [N, 3, S, S], one tensor for each size; batches take turns.
        seconds: how long.
        pixels: of a batch.
        start: what to train further; a new one if not given.
    """
    device = pictures[0].device
    vae = (start or make_vae()).to(device).train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=1e-4)
    begin = time.time()
    step, progress, said = 0, 0.0, 0.0
    while progress < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 200) * max(0.0, 1 - progress) ** 0.75
        pool = pictures[step % len(pictures)]
        rows = torch.randint(len(pool), (max(1, pixels // pool.shape[-1] ** 2),), device=device)
        with autocast(device):
            loss, mse = vae_loss(vae, pool[rows].float() / 127.5 - 1)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 8 == 0:
            loss.item()  # keep the clock honest: let the device catch up
        progress = (time.time() - begin) / seconds
        if progress - said >= 0.2 or progress >= 1.0:
            said = progress
            psnr = -10 * torch.log10(mse / 4).item()
            print(f"vae {progress:4.0%} step {step} loss {loss.item():.4f} psnr {psnr:.1f}", flush=True)
    return vae.eval()


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Tensor, batch: int = 64) -> Tensor:
    """Means of the latents [N, C, H, W], scaled as the pipeline's are."""
    parts = []
    for index in range(0, len(pictures), batch):
        with autocast(pictures.device):
            mean = vae.encoder(pictures[index : index + batch].float() / 127.5 - 1).chunk(2, 1)[0].float()
        parts.append(((mean - vae.config.shift_factor) * vae.config.scaling_factor).to(torch.bfloat16))
    return torch.cat(parts)


@torch.no_grad()
def measure(vae: AutoencoderKL, pictures: Tensor) -> float:
    """Write the moments of the latents into the VAE's config; return the PSNR in dB in single precision."""
    real = pictures.float() / 127.5 - 1
    mean = torch.cat([vae.encoder(part).chunk(2, 1)[0] for part in real.split(16)])
    vae.register_to_config(scaling_factor=float(1 / mean.std()), shift_factor=float(mean.mean()))
    made = torch.cat([vae.decoder(part).clamp(-1, 1) for part in mean.split(16)])
    return float(-10 * torch.log10((made - real).square().mean() / 4))
