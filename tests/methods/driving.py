"""Driving a :class:`ModelRun` without a model: layers of random tensors, step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from problems import qkv
from torch import Tensor
from torch.nn import functional as F

from dit_accel.adapter import StepInfo
from dit_accel.geometry import TokenGeometry
from dit_accel.method import Method
from dit_accel.presets import get_method
from dit_accel.runtime import ModelRun

VIDEO = TokenGeometry((5, 9, 11))

Tensors = tuple[Tensor, Tensor, Tensor]


def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Dense attention, ``[B, S, H, D]``."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def make_run(method: str | Method, layers: int = 4, **options: object) -> ModelRun:
    """A run with so many layers; ``options`` that are fields of a method change it."""
    known = {"min_tokens": 0, "backend": "reference"}
    arguments = {key: options.pop(key) for key in ("run_density",) if key in options}
    run = ModelRun(get_method(method).replace(**options), **known, **arguments)  # type: ignore[arg-type]
    run.set_layers(tuple(f"blocks.{i}.attn" for i in range(layers)))
    return run


def layer_tensors(layer: int, step: int = 0, branch: str = "cond", geometry: TokenGeometry = VIDEO) -> Tensors:
    """Tensors ``[B, S, H, D]`` of a layer, another for each layer and branch, the same at each step."""
    q, k, v = qkv(geometry, seed=17 * layer + (5 if branch == "uncond" else 0))
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def one_step(
    run: ModelRun,
    step: int | None,
    steps: int | None,
    *,
    branches: Sequence[str] = ("cond",),
    layers: Sequence[int] | None = None,
    geometry: TokenGeometry = VIDEO,
    tensors: Callable[..., Tensors] = layer_tensors,
    key_valid: Tensor | None = None,
) -> dict[tuple[str, int], Tensor]:
    """One denoising step; the outputs ``[B, S, H, D]`` by branch and layer."""
    out = {}
    for branch in branches:
        run.begin_forward(geometry, StepInfo(step=step, steps=steps, branch=branch))
        for layer in range(len(run.layers)) if layers is None else layers:
            q, k, v = tensors(layer, step or 0, branch)
            out[branch, layer] = run.attend(
                q, k, v, layer=layer, scale=None, key_valid=key_valid, dense=masked(key_valid)
            )
    return out


def masked(key_valid: Tensor | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Dense attention with a mask of valid keys."""
    if key_valid is None:
        return plain

    def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=key_valid[:, None, None]).transpose(1, 2)

    return dense


def plan_steps(run: ModelRun) -> dict[int, list[int]]:
    """Steps at which each layer planned."""
    found: dict[int, list[int]] = {}
    for plan in run.ledger.plans:
        assert plan.step is not None
        found.setdefault(plan.layer, []).append(plan.step)
    return found


def sparse_steps(run: ModelRun, layer: int) -> list[int | None]:
    """Steps at which a layer was sparse."""
    return [c.step for c in run.ledger.calls if c.layer == layer and isinstance(c.exact, torch.Tensor)]
