"""What the tests of the scored-block methods share: structured inputs, plans and an exact evaluation of a plan."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.context import PlanContext
from dit_accel.geometry import TokenGeometry
from dit_accel.method import Method
from dit_accel.plan import Plan, execute
from dit_accel.planner import Planner
from dit_accel.presets import get_method
from dit_accel.score import Scores, block_scores
from dit_accel_kernels.lists import levels_from_lists
from dit_accel_kernels.types import BlockLists

FLUX = TokenGeometry((1, 32, 32), prefix=77)
HUNYUAN = TokenGeometry((6, 12, 20), suffix=40)
SMALL = TokenGeometry((3, 9, 7), prefix=5, suffix=6)


def inputs(geometry: TokenGeometry, seed: int = 0, heads: int = 3, batch: int = 1, dim: int = 32) -> tuple[Tensor, ...]:
    """Queries that look at what lies near them on the grid, more or less by head, and at some keys of their own choice."""
    gen = torch.Generator().manual_seed(seed)
    frames, height, width = geometry.axes
    axes = torch.meshgrid(torch.arange(frames), torch.arange(height), torch.arange(width), indexing="ij")
    where = torch.stack([a.reshape(-1) / max(n, 1) for a, n in zip(axes, geometry.axes, strict=True)], -1)
    waves = torch.randn(3, dim // 2, generator=gen) * 2
    phase = where @ waves
    place = torch.zeros(geometry.tokens, dim)
    place[geometry.visual_slice] = torch.cat((phase.cos(), phase.sin()), -1)
    strength = torch.linspace(1.0, 3.0, heads)[:, None, None]
    shape = (batch, heads, geometry.tokens, dim)
    q, k, v = (torch.randn(shape, generator=gen) * s for s in (0.5, 0.5, 1.0))
    return q + strength * place, k + strength * place, v


def context(method: Method, q: Tensor, k: Tensor, v: Tensor, geometry: TokenGeometry, **options: object) -> PlanContext:
    """A context in the first of the method's orders."""
    planner = Planner(method)
    key_valid = options.pop("key_valid", None)
    density = options.pop("density", method.density_at(0))
    layout = planner.layout(geometry, q.device)
    order = None if layout.table is None else layout.order(torch.zeros(q.shape[1], dtype=torch.int64))
    ctx = planner.context(
        q,
        k,
        v,
        None,
        geometry,
        density=density,
        scale=None,
        key_valid=key_valid,
        order=order,  # type: ignore[arg-type]
    )
    for name, value in options.items():
        setattr(ctx, name, value)
    return ctx


def scores(name: str, q: Tensor, k: Tensor, v: Tensor, geometry: TokenGeometry, **changes: object) -> Scores:
    """Scores of a preset with some fields changed; ``density`` is the context's."""
    method = get_method(name)
    options = {n: changes.pop(n) for n in ("density", "key_valid", "memory", "layer") if n in changes}
    return block_scores(context(method.replace(**changes), q, k, v, geometry, **options))


def plan(method: Method | str, q: Tensor, k: Tensor, v: Tensor, geometry: TokenGeometry, **options: object) -> Plan:
    """A plan, as the runtime makes it."""
    method = get_method(method)
    planner = Planner(method)
    key_valid = options.pop("key_valid", None)
    ctx = planner.context(
        q,
        k,
        v,
        None,
        geometry,
        density=method.density_at(0),
        scale=None,
        key_valid=key_valid,  # type: ignore[arg-type]
    )
    for name, value in options.items():
        setattr(ctx, name, value)
    return planner.plan(ctx)


def run(made: Plan, q: Tensor, k: Tensor, v: Tensor, key_valid: Tensor | None = None) -> Tensor:
    return execute(made, q, k, v, scale=None, key_valid=key_valid, backend=None)


def token_mask(made: Plan, key: Tensor) -> Tensor:
    """Which query sees which key, bool ``[B, H, S, S]`` in block order."""
    batch, heads, tokens, _ = key.shape
    mask = made.mask
    levels = mask.levels().expand(batch, heads, -1, -1) > 0
    seen = levels.repeat_interleave(mask.block_q, 2).repeat_interleave(mask.block_k, 3)[..., :tokens, :tokens].clone()
    if made.gather is not None:
        found = made.gather.keys(key, key, None)
        lists = BlockLists(found.row_start, found.count, None, found.indices, mask.block_q, 1)
        columns = levels_from_lists(lists, tokens).expand(batch, heads, -1, -1) > 0
        columns = columns.repeat_interleave(mask.block_q, 2)[:, :, :tokens]
        assert not (columns & seen).any(), "a key is both in an exact block and gathered"
        seen |= columns
    return seen


def natural(made: Plan, seen: Tensor) -> Tensor:
    """A mask in block order, moved to natural order."""
    if made.order is None:
        return seen
    back = made.order.table[made.order.head.long()].long().argsort(-1)
    heads = seen.shape[1]
    return torch.stack([seen[:, h][:, back[h]][:, :, back[h]] for h in range(heads)], 1)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, key_valid: Tensor | None = None) -> Tensor:
    """Dense attention under a mask in natural order."""
    if key_valid is not None:
        seen = seen & key_valid[:, None, None]
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
