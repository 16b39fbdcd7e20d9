"""Train the transformer and the text encoder together, by flow matching, for a number of seconds."""

from __future__ import annotations

import copy
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from concepts import sentences
from models import (
    encode_text,
    make_text_encoder,
    make_tokenizer,
    make_transformer,
)
from muon import Optimizer
from torch import nn
from train_vae import autocast

#: Clips a step for each length in latent frames: about the same number of tokens.
BATCHES = {5: 96, 9: 64, 17: 32, 33: 16}
#: Share of the steps each length gets in the first half of the time, and in the second.
EARLY = {5: 0.1, 9: 0.5, 17: 0.35, 33: 0.05}
LATE = {5: 0.06, 9: 0.12, 17: 0.12, 33: 0.70}
SHIFT = 3.0
DROP = 0.1


@dataclass
class Trainer:
    """The models, their average, and the optimiser."""

    prompts: list[str]
    device: torch.device
    shape: dict[str, int] = field(default_factory=dict)
    rate: float = 2e-3
    average: float = 0.998
    steps: int = 0
    seconds: float = 0.0
    clips_seen: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        said = sentences(self.prompts)
        self.tokenizer = make_tokenizer([text for texts in said for text in texts])
        flat = [text for texts in said for text in texts] + [""]
        tokens = self.tokenizer(flat, padding="longest", return_tensors="pt").to(self.device)
        self.ids, self.mask = tokens.input_ids, tokens.attention_mask
        self.ways = len(said[0])
        self.model = make_transformer(**self.shape).to(self.device)
        self.text = make_text_encoder(len(self.tokenizer)).to(self.device)
        self.ema_model = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.ema_text = copy.deepcopy(self.text).requires_grad_(False).eval()
        self.optimizer = Optimizer(self.model, [self.text])

    def compile(self) -> None:
        """Compile one block for all of them."""
        torch._dynamo.config.recompile_limit = 64
        for block in self.model.blocks:
            block.compile(dynamic=False)

    def text_of(self, clips: torch.Tensor) -> torch.Tensor:
        """Embed one way of naming each clip; one in ten is left unnamed."""
        way = torch.randint(self.ways, clips.shape, device=self.device)
        way = torch.where(torch.rand(clips.shape, device=self.device) < 0.5, 0, way)
        row = clips * self.ways + way
        row = torch.where(torch.rand(clips.shape, device=self.device) < DROP, len(self.ids) - 1, row)
        return encode_text(self.text, self.ids[row], self.mask[row])

    def sigmas(self, count: int) -> torch.Tensor:
        """Noise levels: logit-normal, one in ten uniform, then shifted as the sampler does."""
        spread = (torch.randperm(count, device=self.device) + torch.rand(count, device=self.device)) / count
        normal = torch.sigmoid(torch.special.ndtri(spread.clamp(1e-4, 1 - 1e-4)))
        flat = torch.rand(count, device=self.device)
        sigma = torch.where(torch.rand(count, device=self.device) < 0.1, flat, normal)
        return SHIFT * sigma / (1 + (SHIFT - 1) * sigma)

    def step(self, latents: torch.Tensor, clips: torch.Tensor, rate: float) -> torch.Tensor:
        """One step of flow matching; returns the loss without waiting for it."""
        noise = torch.randn(latents.shape, device=self.device)
        sigma = self.sigmas(len(latents))
        mix = sigma.view(-1, 1, 1, 1, 1)
        noisy = (1 - mix) * latents + mix * noise
        with autocast(self.device):
            out = self.model(noisy, sigma * 1000, self.text_of(clips), return_dict=False)[0]
        loss = (out.float() - (noise - latents)).square().mean()
        loss.backward()
        self.optimizer.step(rate)
        self.steps += 1
        decay = min(self.average, (1 + self.steps) / (10 + self.steps))
        for average, module in ((self.ema_model, self.model), (self.ema_text, self.text)):
            ours, theirs = list(average.parameters()), list(module.parameters())
            torch._foreach_lerp_(ours, [p.detach() for p in theirs], 1 - decay)
        return loss.detach()

    def rate_at(self, progress: float) -> float:
        """Warm up over 100 steps, hold, and fall to zero over the last 45 % of the time."""
        return self.rate * min(1.0, (self.steps + 1) / 100, max(0.0, (1 - progress) / 0.45))

    def run(self, latents: torch.Tensor, owners: torch.Tensor, seconds: float, horizon: float) -> None:
        """Train for `seconds`, as part of a schedule that lasts `horizon` seconds in all."""
        start, earlier, said = time.time(), self.seconds, time.time()
        losses: list[torch.Tensor] = []
        times: Counter[int] = Counter()
        while (spent := time.time() - start) < seconds and earlier + spent < horizon:
            progress = (earlier + spent) / horizon
            shares = EARLY if progress < 0.5 else LATE
            length = random.choices(list(shares), list(shares.values()))[0]
            length = min(length, latents.shape[2])
            batch = BATCHES[length]
            rows = torch.randint(len(latents), (batch,), device=self.device)
            losses.append(self.step(latents[rows, :, :length].float(), owners[rows], self.rate_at(progress)))
            self.clips_seen[length] += batch
            if self.steps % 4 == 0:
                losses[-1].item()  # keep the clock honest: let the device catch up
            times[length] += 1
            if time.time() - said > 15:
                mean = torch.stack(losses).mean().item()
                said, losses = time.time(), []
                print(
                    f"dit {progress:4.0%} step {self.steps} loss {mean:.4f} rate {self.rate_at(progress):.1e} "
                    f"steps by length {dict(times)}",
                    flush=True,
                )
                times.clear()
        self.seconds = earlier + time.time() - start

    def save(self, path: Path) -> None:
        """Keep all that a later run needs to go on."""
        state = {
            "model": self.model.state_dict(),
            "text": self.text.state_dict(),
            "ema_model": self.ema_model.state_dict(),
            "ema_text": self.ema_text.state_dict(),
            "adam": self.optimizer.adam.state_dict(),
            "muon": self.optimizer.muon.buffers,
            "steps": self.steps,
            "seconds": self.seconds,
            "clips_seen": dict(self.clips_seen),
        }
        torch.save(state, path)

    def load(self, path: Path) -> None:
        """Go on from `save`."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        for name in ("model", "text", "ema_model", "ema_text"):
            module: nn.Module = getattr(self, name)
            module.load_state_dict(state[name])
        self.optimizer.adam.load_state_dict(state["adam"])
        self.optimizer.muon.buffers = state["muon"]
        self.steps, self.seconds = state["steps"], state["seconds"]
        self.clips_seen = Counter(state["clips_seen"])


def warm_up(trainer: Trainer, lengths: list[int], size: int = 32) -> None:
    """Run one step of every length on noise, so that the compiler's cache on disk is filled."""
    channels = trainer.model.config.in_channels
    for length in lengths:
        began = time.time()
        noise = torch.randn(BATCHES[length], channels, length, size, size, device=trainer.device)
        rows = torch.zeros(BATCHES[length], dtype=torch.long, device=trainer.device)
        trainer.step(noise, rows, 0.0)
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()
        print(f"compiled length {length} in {time.time() - began:.1f} s", flush=True)
