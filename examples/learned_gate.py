"""Train a block gate on tiny Wan in minutes: python examples/learned_gate.py --out gate.safetensors

The gate learns which blocks hold the softmax mass: dense runs give the exact mass of each block, and the gate, two small
matrices a head that begin as mean pooling, is fitted to it by the Kullback-Leibler divergence, as SeerAttention distils its
own (arXiv 2410.13276). What it is worth is measured on a prompt that it has not seen, as the mass that the best quarter of
the blocks holds. Afterwards:

    dit_accel.register_scorer("seer", "gate.safetensors")
    dit_accel.enable(pipe, "seer", density=0.25)
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_accel.adapter import DenseFn, StepInfo
from dit_accel.demo.pipeline import load
from dit_accel.gate import Gate, GateInfo
from dit_accel.geometry import TokenGeometry
from dit_accel.learned import pool
from dit_accel.registry import find_adapter, install
from dit_accel_kernels import block_mass, dense_attention

TRAIN = ("octopus", "rocket", "tiger face")
TEST = ("sailboat",)
BLOCK = 64
KEYS = ("mean", "max", "min")


@dataclass
class Sample:
    """One attention call: features ``[B, H, Qb|Kb, F * D]``, logits of mean pooling and exact mass ``[B, H, Qb, Kb]``."""

    query: Tensor
    key: Tensor
    base: Tensor
    mass: Tensor


class Watcher:
    """Stands where dit_accel's run stands, lets every call be dense, and keeps what the gate learns from."""

    wants_cross = False

    def __init__(self) -> None:
        self.samples: dict[int, list[Sample]] = defaultdict(list)

    def begin_forward(self, geometry: TokenGeometry | str, step: StepInfo) -> None:
        """Nothing depends on the step."""

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        layer: int,
        scale: float | None,
        key_valid: Tensor | None,
        dense: DenseFn,
    ) -> Tensor:
        """Dense attention; its block mass is what the gate should give."""
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        out, lse = dense_attention(q, k, v, scale=scale, key_valid=key_valid)
        mass = block_mass(q, k, lse, block_q=BLOCK, block_k=BLOCK, scale=scale, key_valid=key_valid)
        sizes = torch.ones(k.shape[2], device=k.device).split(BLOCK)
        means = pool(q, BLOCK, ("mean",)), pool(k, BLOCK, ("mean",), key_valid)
        base = means[0] * scale @ means[1].mT + torch.stack([part.sum() for part in sizes]).log()
        self.samples[layer].append(Sample(means[0], pool(k, BLOCK, KEYS, key_valid), base, mass))
        return out.transpose(1, 2)

    def cross(self, layer: int, output: Tensor) -> Tensor:
        """Cross-attention is left alone."""
        return output

    def decline(self, layer: int, reason: str) -> None:
        """What cannot be learned from is an error here."""
        raise RuntimeError(f"layer {layer}: {reason}")

    def reset(self) -> None:
        """Samples outlive runs."""


def watch(
    pipe: Any, prompts: Sequence[str], args: argparse.Namespace
) -> tuple[dict[int, list[Sample]], tuple[str, ...]]:
    """Samples of dense runs by layer, and the layers' names."""
    adapter, watcher = find_adapter(pipe.transformer), Watcher()
    assert adapter is not None
    installed = install(pipe.transformer, adapter, watcher, pipe)
    call = {"height": args.size, "width": args.size, "num_frames": args.frames, "num_inference_steps": args.steps}
    try:
        for seed, prompt in enumerate(prompts):
            generator = torch.Generator().manual_seed(seed)
            pipe(prompt, guidance_scale=4.0, generator=generator, output_type="latent", **call)
    finally:
        installed.undo()
    return watcher.samples, installed.layers


def joined(samples: list[Sample]) -> Sample:
    """Samples of one layer as one batch."""
    return Sample(*(torch.cat([getattr(s, name) for s in samples]) for name in ("query", "key", "base", "mass")))


def fit(data: Sample, width: int, iterations: int) -> tuple[Tensor, Tensor]:
    """The two matrices of one layer, ``[H, Fq * D, W]`` and ``[H, Fk * D, W]``."""
    heads, features = data.query.shape[1], (data.query.shape[3], data.key.shape[3])
    gen = torch.Generator().manual_seed(0)
    device = data.query.device
    query = (torch.randn(heads, features[0], width, generator=gen) * features[0] ** -0.5).to(device).requires_grad_()
    key = torch.zeros(heads, features[1], width, device=device, requires_grad=True)
    optimizer = torch.optim.AdamW([query, key], lr=0.005, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.005, total_steps=iterations)
    target = data.mass.clamp(min=1e-9)
    for _ in range(iterations):
        chosen = torch.randint(len(data.base), (min(16, len(data.base)),), generator=gen).to(device)
        logits = data.base[chosen] + (data.query[chosen] @ query) @ (data.key[chosen] @ key).mT
        loss = (target[chosen] * (target[chosen].log() - logits.log_softmax(-1))).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return query.detach(), key.detach()


def recall(scores: Tensor, mass: Tensor, density: float) -> float:
    """Mass that the best ``density`` of the blocks of each row holds."""
    count = max(round(density * mass.shape[-1]), 1)
    return float(mass.gather(-1, scores.topk(count, dim=-1).indices).sum(-1).mean())


def main() -> None:
    """Watch, fit, measure, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gate.safetensors"))
    parser.add_argument("--size", type=int, default=128, help="height and width in pixels")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--iterations", type=int, default=150)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--density", type=float, default=0.25)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipe = load(Path(__file__).parent / "tiny_wan", device)
    began = time.perf_counter()
    seen, layers = watch(pipe, TRAIN, args)
    unseen, _ = watch(pipe, TEST, args)
    weights, rows = [], []
    for layer in range(len(layers)):
        query, key = fit(joined(seen[layer]), args.width, args.iterations)
        weights.append((query.half(), key.half()))
        test = joined(unseen[layer])
        gated = test.base + (test.query @ query.half().float()) @ (test.key @ key.half().float()).mT
        rows.append([recall(s, test.mass, args.density) for s in (test.base, gated, test.mass)])
        print(
            f"layer {layer}: recall of mean pooling {rows[-1][0]:.4f}, gate {rows[-1][1]:.4f}, exact {rows[-1][2]:.4f}"
        )
    mean = torch.tensor(rows).mean(0).tolist()
    print(f"all layers, unseen prompt, density {args.density:g}:", end=" ")
    print(f"mean pooling {mean[0]:.4f}, gate {mean[1]:.4f}, exact mass {mean[2]:.4f}")
    heads, dim = weights[0][0].shape[0], weights[0][0].shape[1]
    info = GateInfo(
        type(pipe.transformer).__name__,
        layers,
        heads,
        dim,
        BLOCK,
        BLOCK,
        key_pools=KEYS,
        note=f"tiny Wan, {args.size} x {args.size}, {args.frames} frames, {args.steps} steps, {len(TRAIN)} prompts",
    )
    Gate(info, *(torch.stack(part) for part in zip(*weights, strict=True))).save(args.out)
    print(f"{args.out}: {args.out.stat().st_size / 1e3:.0f} kB, {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
