"""Inputs of the Hopper benchmarks: shapes, densities, and random masks with equal or uneven rows."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dit_accel_kernels.lists import lists_from_levels, pack_bits
from dit_accel_kernels.types import BlockLists, Pooled

SHAPES = {
    "H12 S32768 d128": (12, 32768, 128),
    "H24 S16896 d128": (24, 16896, 128),
    "H30 S17792 d64": (30, 17792, 64),
    "H40 S75648 d128": (40, 75648, 128),
}

CASES = ((1.0, False), (0.5, False), (0.25, False), (0.1, False), (0.25, True), (0.1, True))

LONG_CASES = ((0.25, False), (0.25, True))

FLUX_SHORT = (24, 4608, 128)  # FLUX at 1024 x 1024 with its text


def make(
    heads: int, tokens: int, dim: int, density: float, uneven: bool = False, block_k: int = 128
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v ``[1, H, S, D]`` as views of ``[1, S, H, D]`` and levels ``[1, H, Qb, Kb]``, equal or uneven rows."""
    gen = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(1, tokens, heads, dim, generator=gen, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for _ in range(3)
    )
    qb, kb = -(-tokens // 128), -(-tokens // block_k)
    keep = torch.full((1, heads, qb, 1), max(1.0, round(density * kb)), device="cuda")
    if uneven:  # exponential lengths: their standard deviation is about their mean
        share = torch.empty(1, heads, qb, 1, device="cuda").exponential_(generator=gen)
        keep = (keep * share).round().clamp(1, kb)
    rank = torch.rand(1, heads, qb, kb, generator=gen, device="cuda").argsort(-1).argsort(-1)
    return q, k, v, (rank < keep).to(torch.uint8)


def to_lists(levels: Tensor, block_k: int = 128) -> BlockLists:
    return replace(lists_from_levels(levels, 128, block_k), partial=None)


def remainder(k: Tensor, v: Tensor, levels: Tensor) -> Pooled:
    blocks = levels.shape[-1]
    size = k.shape[2] // blocks
    means = [x.float().reshape(1, x.shape[1], blocks, size, x.shape[3]).mean(3).to(x.dtype) for x in (k, v)]
    bias = torch.full((1, 1, blocks), float(size), device=k.device).log()
    return Pooled(means[0], means[1], bias, pack_bits(levels))
