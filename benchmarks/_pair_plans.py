"""Masks of real plans: what ``auto`` chooses for queries and keys of the tiny models, in blocks of 64 x 64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_accel.geometry import TokenGeometry
from dit_accel.planner import Planner
from dit_accel.presets import get_method
from dit_accel_kernels.lists import levels_from_lists

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PROMPT = "a large teal triangle on a wavy gray background"


@contextmanager
def attended(tokens: int) -> Iterator[list[tuple[Tensor, ...]]]:
    """Queries, keys and values ``[1, H, tokens, D]`` of every dense attention of that length within this context."""
    functional: Any = torch.nn.functional
    original, found = functional.scaled_dot_product_attention, []

    def watch(query: Tensor, key: Tensor, value: Tensor, *args: Any, **more: Any) -> Tensor:
        if query.shape[2] == key.shape[2] == tokens:
            found.append((query[:1], key[:1], value[:1]))
        out: Tensor = original(query, key, value, *args, **more)
        return out

    functional.scaled_dot_product_attention = watch
    try:
        yield found
    finally:
        functional.scaled_dot_product_attention = original


def flux_levels(side: int, density: float, heads: int, device: str) -> Tensor:
    """Levels ``[1, heads, Qb, Kb]`` for a picture of ``side * side`` tokens, from the last layers of the tiny FLUX."""
    from diffusers import FluxPipeline

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe = FluxPipeline.from_pretrained(EXAMPLES / "tiny_flux", torch_dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    text = 128
    geometry = TokenGeometry((1, side, side), prefix=text)
    with attended(geometry.tokens) as found:
        pipe(
            PROMPT,
            height=4 * side,
            width=4 * side,
            max_sequence_length=text,
            num_inference_steps=1,
            output_type="latent",
        )
    return _planned(found, geometry, density, heads)


def wan_levels(grid: tuple[int, int, int], density: float, heads: int, device: str) -> Tensor:
    """Levels ``[1, heads, Qb, Kb]`` for a clip of that grid of tokens, from the last layers of the tiny Wan."""
    from diffusers import WanPipeline

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe = WanPipeline.from_pretrained(EXAMPLES / "tiny_wan", torch_dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    frames, height, width = grid
    geometry = TokenGeometry(grid)
    with attended(geometry.tokens) as found:
        pipe(
            "red heart", height=8 * height, width=8 * width, guidance_scale=1.0, num_inference_steps=1,
            output_type="latent", num_frames=(frames - 1) * pipe.vae_scale_factor_temporal + 1,
        )  # fmt: skip
    return _planned(found, geometry, density, heads)


def _planned(found: list[tuple[Tensor, ...]], geometry: TokenGeometry, density: float, heads: int) -> Tensor:
    """The plans of the last layers, until there are enough heads."""
    planner = Planner(replace(get_method("auto").fitting(geometry), block_q=64, block_k=64, hopper_blocks=None))
    levels: list[Tensor] = []
    for q, k, v in reversed(found):
        plan = planner.plan(planner.context(q, k, v, None, geometry, density=density, scale=None))
        lists = plan.mask.lists()
        levels.append(levels_from_lists(lists, -(-geometry.tokens // 64)).expand(1, q.shape[1], -1, -1))
        if sum(x.shape[1] for x in levels) >= heads:
            break
    made = torch.cat(levels, 1)
    made = made.repeat(1, -(-heads // made.shape[1]), 1, 1)[:, :heads]
    return (made != 0).to(torch.uint8)
