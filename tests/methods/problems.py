"""Small problems for methods: geometries, tensors with structure, and plans of a preset."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.context import PlanContext
from dit_accel.geometry import TokenGeometry
from dit_accel.plan import Plan, execute
from dit_accel.planner import Planner
from dit_accel.presets import get_method
from dit_accel_kernels import dense_attention

CPU = torch.device("cpu")
VIDEO = TokenGeometry((5, 9, 11))  # 495 tokens: ragged blocks
HUNYUAN = TokenGeometry((4, 10, 12), suffix=40)
FLUX = TokenGeometry((1, 24, 24), prefix=77)
GEOMETRIES = [VIDEO, HUNYUAN, FLUX]


def qkv(
    geometry: TokenGeometry, seed: int = 0, *, heads: int = 2, batch: int = 1, dim: int = 32, gain: float = 1.5
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys that look at tokens of their own neighbourhood and at a few popular ones, ``[B, H, S, D]``."""
    gen = torch.Generator().manual_seed(seed)
    shape = (batch, geometry.tokens, heads, dim)
    q, k, v = (torch.randn(shape, generator=gen).transpose(1, 2) for _ in range(3))
    frames, height, width = geometry.axes
    place = torch.arange(geometry.visual)
    waves = torch.stack(
        (place // (height * width) / frames, place // width % height / height, place % width / width), 1
    )
    angles = waves.repeat_interleave(4, 1) * torch.tensor([1.0, 2.0, 3.0, 4.0]).repeat(3) * torch.pi
    part = geometry.visual_slice
    q[:, :, part, :12] = angles.cos() * 2
    k[:, :, part, :12] = angles.cos() * 2
    return q * gain, k, v


def context(
    name: str,
    geometry: TokenGeometry,
    tensors: tuple[Tensor, Tensor, Tensor],
    *,
    key_valid: Tensor | None = None,
    **changes: object,
) -> tuple[Planner, PlanContext]:
    """A planner of a preset and a context with all that a planning step knows."""
    method = get_method(name).replace(**changes) if changes else get_method(name)
    planner = Planner(method)
    q, k, v = tensors
    out, lse = dense_attention(q, k, v, scale=None, key_valid=key_valid)
    ctx = planner.context(q, k, v, lse, geometry, density=method.density_at(0), scale=None, key_valid=key_valid)
    ctx.dense_out = out
    return planner, ctx


def make_plan(
    name: str,
    geometry: TokenGeometry,
    tensors: tuple[Tensor, Tensor, Tensor],
    *,
    key_valid: Tensor | None = None,
    **changes: object,
) -> Plan:
    """A plan of a preset."""
    planner, ctx = context(name, geometry, tensors, key_valid=key_valid, **changes)
    if not planner.method.plans_from_data:
        return planner.pattern_plan(geometry, CPU, ctx.density, ctx.query.shape[1])
    return planner.plan(ctx)


def run(plan: Plan, tensors: tuple[Tensor, Tensor, Tensor], key_valid: Tensor | None = None) -> Tensor:
    """Sparse attention by a plan, ``[B, H, S, D]``."""
    return execute(plan, *tensors, scale=None, key_valid=key_valid, backend="reference")
