"""Attention over a small video whose neighbouring tokens are alike, as in real models."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dit_accel.context import PlanContext
from dit_accel.geometry import TokenGeometry
from dit_accel.plan import execute
from dit_accel.planner import Planner
from dit_accel_kernels import dense_attention

GRID = (6, 16, 16)


class Problem(NamedTuple):
    """Queries, keys and values ``[1, H, S, D]``, with dense output and log-sum-exp."""

    geometry: TokenGeometry
    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    lse: Tensor

    def context(self, planner: Planner, *, dense: bool = True, key_valid: Tensor | None = None) -> PlanContext:
        ctx = planner.context(
            self.query, self.key, self.value, self.lse, self.geometry, density=0.2, scale=None, key_valid=key_valid
        )
        ctx.dense_out = self.out if dense else None
        return ctx

    def error_of(self, planner: Planner, ctx: PlanContext) -> tuple[float, float]:
        """Relative error of the plan that a context leads to, and its density."""
        plan = planner.plan(ctx)
        found = execute(
            plan, self.query, self.key, self.value, scale=None, key_valid=ctx.key_valid, backend="reference"
        )
        return float((found - self.out).norm() / self.out.norm()), float(plan.density.mean())


def _smooth(x: Tensor) -> Tensor:
    video = x[:, :, : 6 * 16 * 16].unflatten(2, GRID)
    for _ in range(3):
        for axis in (2, 3, 4):
            video = (video + video.roll(1, axis) + video.roll(-1, axis)) / 3
    return torch.cat([(video / video.std()).flatten(2, 4), x[:, :, 6 * 16 * 16 :]], 2)


def make_problem(heads: int = 4, dim: int = 32, text: int = 20, seed: int = 0) -> Problem:
    """Heads from diffuse to peaked."""
    gen = torch.Generator().manual_seed(seed)
    geometry = TokenGeometry(GRID, suffix=text)
    query, key, value = (_smooth(torch.randn(1, heads, geometry.tokens, dim, generator=gen)) * 1.7 for _ in range(3))
    query = query * torch.linspace(0.5, 2, heads)[None, :, None, None]
    key = (key + query) / 1.4
    out, lse = dense_attention(query, key, value)
    return Problem(geometry, query, key, value, out, lse)
