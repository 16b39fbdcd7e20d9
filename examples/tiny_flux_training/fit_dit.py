"""Train the transformer and both text encoders together, by flow matching, for a number of seconds."""

from __future__ import annotations

import copy
import random
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from fit_vae import autocast
from parts import (
    POOLED_LENGTH,
    SHORT_LENGTH,
    TEXT_LENGTH,
    make_pooled_encoder,
    make_text_encoder,
    make_tokenizers,
    make_transformer,
    packed,
    picture_places,
)
from safetensors.torch import load_file
from torch import Tensor, nn

from muon import Muon  # isort: skip  (of ../tiny_wan_training, where `parts` points)

#: Pictures a step for each side of the picture in tokens.
BATCHES = {32: 128, 64: 32}
#: Text positions, and how often: a short text, and at the larger side what the pipeline pads to if it is told nothing.
LENGTHS = {32: {SHORT_LENGTH: 1.0}, 64: {SHORT_LENGTH: 0.8, TEXT_LENGTH: 0.2}}
#: Noise is shifted by this much more at the larger side, which has four times as many pixels to tell the content.
SHIFTS = {32: 1.8, 64: 3.0}
DROP = 0.1


@dataclass
class Pool:
    """Encoded pictures [N, C, H, W] and what they show."""

    latents: Tensor
    ids: Tensor

    @property
    def side(self) -> int:
        """Tokens across a picture."""
        return self.latents.shape[-1] // 2


@dataclass
class Trainer:
    """The models, their average, and the optimiser."""

    sentences: list[str]
    device: torch.device
    shape: dict[str, int] = field(default_factory=dict)
    rate: float = 2e-3
    average: float = 0.998
    half: bool = False  # whether steps use a copy of the weights in bfloat16
    long_texts: Callable[[], bool] = lambda: True  # whether texts of full length are compiled, too
    steps: int = 0
    seconds: float = 0.0
    seen: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.short, self.long = make_tokenizers(self.sentences)
        words = len(self.long)
        self.models = nn.ModuleDict(
            {
                "transformer": make_transformer(**self.shape),
                "text": make_text_encoder(words),
                "pooled": make_pooled_encoder(words),
            }
        ).to(self.device)
        self.ema = copy.deepcopy(self.models).requires_grad_(False).eval()
        self.fast = copy.deepcopy(self.models).to(torch.bfloat16) if self.half else self.models
        named = dict(self.models.named_parameters())
        hidden = {n for n, p in named.items() if p.ndim == 2 and "transformer_blocks." in n and ".norm" not in n}
        self.muon = Muon([named[n] for n in sorted(hidden)])
        rest = [p for n, p in named.items() if n not in hidden]
        fused = self.device.type == "cuda"
        self.adam = torch.optim.AdamW(rest, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0, fused=fused)

    def compile(self) -> None:
        """Compile each kind of block once."""
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.suppress_errors = True
        transformer = self.fast["transformer"]
        for block in [*transformer.transformer_blocks, *transformer.single_transformer_blocks]:
            block.compile(dynamic=False)

    def is_finite(self) -> bool:
        """Whether no weight has become NaN."""
        return all(bool(torch.isfinite(p).all()) for p in self.models.parameters())

    def tokens(self, sentences: list[str]) -> Tensor:
        """Words [N, 77], padded with zeros, which is the padding of both tokenizers."""
        found = self.short(sentences, padding="max_length", max_length=POOLED_LENGTH, return_tensors="pt")
        return found.input_ids.to(self.device)

    def predict(
        self, models: nn.ModuleDict, noisy: Tensor, sigma: Tensor, ids: Tensor, length: int = SHORT_LENGTH
    ) -> Tensor:
        """Velocity of packed latents, with `length` positions of text encoded as `FluxPipeline` does."""
        side = int(noisy.shape[1] ** 0.5)
        long = nn.functional.pad(ids, (0, length - POOLED_LENGTH))
        kind = next(models["transformer"].parameters()).dtype
        with autocast(self.device) if kind == torch.float32 else nullcontext():
            states = models["text"](long).last_hidden_state
            pooled = models["pooled"](ids).pooler_output
            out = models["transformer"](
                hidden_states=noisy.to(kind),
                timestep=sigma,
                pooled_projections=pooled,
                encoder_hidden_states=states,
                txt_ids=torch.zeros(length, 3, device=self.device, dtype=kind),
                img_ids=picture_places(side, self.device).to(kind),
                return_dict=False,
            )[0]
        return out.float()

    def sigmas(self, count: int, shift: float) -> Tensor:
        """Noise levels: logit-normal, one in ten uniform, then shifted as the sampler does."""
        spread = (torch.randperm(count, device=self.device) + torch.rand(count, device=self.device)) / count
        normal = torch.sigmoid(torch.special.ndtri(spread.clamp(1e-4, 1 - 1e-4)))
        flat = torch.rand(count, device=self.device)
        sigma = torch.where(torch.rand(count, device=self.device) < 0.1, flat, normal)
        return shift * sigma / (1 + (shift - 1) * sigma)

    def step(self, pool: Pool, rate: float, length: int | None = None) -> Tensor:
        """One step of flow matching; returns the loss without waiting for it."""
        side = pool.side
        if length is None:
            length = random.choices(list(LENGTHS[side]), list(LENGTHS[side].values()))[0]
            length = length if self.long_texts() else SHORT_LENGTH
        rows = torch.randint(len(pool.latents), (BATCHES[side],), device=self.device)
        ids = pool.ids[rows]
        ids = torch.where(torch.rand(len(rows), 1, device=self.device) < DROP, self.nothing, ids)
        clean = packed(pool.latents[rows]).float()
        noise = torch.randn_like(clean)
        sigma = self.sigmas(len(rows), SHIFTS[side])
        mix = sigma.view(-1, 1, 1)
        out = self.predict(self.fast, (1 - mix) * clean + mix * noise, sigma, ids, length)
        loss = (out - (noise - clean)).square().mean()
        loss.backward()
        self.update(rate)
        return loss.detach()

    @torch.no_grad()
    def update(self, rate: float) -> None:
        """Clip, step, average."""
        parameters, fast = list(self.models.parameters()), list(self.fast.parameters())
        if self.half:
            for parameter, other in zip(parameters, fast, strict=True):
                parameter.grad = None if other.grad is None else other.grad.float()
                other.grad = None
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        self.muon.step(rate)
        for parameter in parameters:
            parameter.grad = None
        if self.half:
            torch._foreach_copy_(fast, parameters)
        self.steps += 1
        decay = min(self.average, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(list(self.ema.parameters()), parameters, 1 - decay)

    @property
    def nothing(self) -> Tensor:
        """The empty sentence [1, 77]."""
        if not hasattr(self, "_nothing"):
            self._nothing = self.tokens([""])
        return self._nothing

    @torch.no_grad()
    def loss_of(self, pool: Pool, batch: int = 32) -> float:
        """Loss of the averaged weights over pictures never trained on, at fixed noise."""
        generator = torch.Generator(self.device).manual_seed(1)
        total = 0.0
        for index in range(0, len(pool.latents), batch):
            clean = packed(pool.latents[index : index + batch]).float()
            noise = torch.randn(clean.shape, generator=generator, device=self.device)
            sigma = (torch.arange(len(clean), device=self.device) + 0.5) / len(clean)
            shift = SHIFTS[pool.side]
            sigma = shift * sigma / (1 + (shift - 1) * sigma)
            mix = sigma.view(-1, 1, 1)
            out = self.predict(self.ema, (1 - mix) * clean + mix * noise, sigma, pool.ids[index : index + batch])
            total += float((out - (noise - clean)).square().mean()) * len(clean)
        return total / len(pool.latents)

    def run(
        self,
        pools: dict[int, Pool],
        share: Callable[[float], float],
        seconds: float,
        rate_at: Callable[[float, int], float],
        keep: Callable[[], None],
        check: Callable[[Trainer], None],
        every: float = 30.0,
    ) -> None:
        """Train for `seconds`.

        Args:
            pools: by side.
            share: of the smaller side among the steps, by the part of the time that is over.
            seconds: how long.
            rate_at: learning rate by that part and the steps done.
            keep: called every so many seconds.
            check: called every few steps.
            every: that many.
        """
        began = said = kept = time.time()
        losses: dict[int, list[Tensor]] = {side: [] for side in pools}
        sides = sorted(pools)
        while (spent := time.time() - began) < seconds:
            progress = spent / seconds
            side = sides[0] if random.random() < share(progress) else sides[-1]
            losses[side].append(self.step(pools[side], rate_at(progress, self.steps)))
            self.seen[side] += BATCHES[side]
            if self.steps % 16 == 0:
                check(self)
            if self.steps % 4 == 0:
                losses[side][-1].item()  # keep the clock honest: let the device catch up
            if time.time() - said > 10:
                said = time.time()
                means = {s: f"{torch.stack(v).mean().item():.4f}" for s, v in losses.items() if v}
                losses = {s: [] for s in pools}
                rate = rate_at(progress, self.steps)
                print(f"dit {progress:4.0%} step {self.steps} loss {means} rate {rate:.1e}", flush=True)
            if time.time() - kept > every:
                keep()
                kept = time.time()
        self.seconds += time.time() - began

    def load(self, folder: Path) -> None:
        """Go on from the averaged weights of an exported pipeline; the optimiser's state is not kept."""
        for name, part in (("transformer", "transformer"), ("text", "text_encoder_2"), ("pooled", "text_encoder")):
            (path,) = (folder / part).glob("*.safetensors")
            state = load_file(path, device=str(self.device))
            for models in (self.models, self.ema, self.fast):
                # Embeddings that a library ties to each other are in the file once.
                missing, unexpected = models[name].load_state_dict(state, strict=False)
                if unexpected or not set(missing) <= {"encoder.embed_tokens.weight", "shared.weight"}:
                    raise ValueError(f"{path} does not fit: missing {missing}, unexpected {unexpected}")
