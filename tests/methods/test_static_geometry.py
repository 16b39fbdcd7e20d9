"""Properties of every static preset, on video and image geometries with text in front and behind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dit_accel.geometry import TokenGeometry
from dit_accel.order import inverse_index
from dit_accel.plan import Plan, execute
from dit_accel.planner import Planner
from dit_accel.presets import get_method
from dit_accel_kernels import permute_tokens, unpermute_tokens

CPU = torch.device("cpu")
PRESETS = ("na", "dina", "gna", "sta", "freeswim", "radial", "streaming", "power", "halo", "svg1", "vertical_slash")
FLUX = TokenGeometry((1, 32, 32), prefix=77)
HUNYUAN = TokenGeometry((6, 12, 20), suffix=40)
WAN = TokenGeometry((9, 16, 16))
RAGGED = TokenGeometry((5, 7, 9), prefix=13)


def _qkv(geometry: TokenGeometry, heads: int = 2, dim: int = 32, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Keys that look like their neighbours on the grid: smooth over the visual tokens, noise for text."""
    gen = torch.Generator().manual_seed(7)
    coarse = torch.randn(batch * heads, dim, *(max(n // 3, 1) for n in geometry.axes), generator=gen)
    smooth = F.interpolate(coarse, geometry.axes, mode="trilinear").flatten(2).mT.unflatten(0, (batch, heads))
    text = torch.randn(batch, heads, geometry.extra, dim, generator=gen)
    field = torch.cat((text[:, :, : geometry.prefix], smooth, text[:, :, geometry.prefix :]), 2)
    q, k, v = (field + 0.3 * torch.randn(field.shape, generator=gen) for _ in range(3))
    return 2 * q, k, v


def _plan(name: str, geometry: TokenGeometry, qkv: tuple[Tensor, Tensor, Tensor], **changes: object) -> Plan:
    method = get_method(name).replace(**changes)
    planner = Planner(method)
    q, k, v = qkv
    if not method.plans_from_data:
        return planner.pattern_plan(geometry, CPU, method.density_at(0), q.shape[1])
    return planner.plan(planner.context(q, k, v, None, geometry, density=method.density_at(0), scale=None))


@pytest.mark.parametrize("geometry", [FLUX, HUNYUAN, WAN, RAGGED], ids=str)
@pytest.mark.parametrize("density", [None, 0.5, 0.3, 0.2, 0.1])
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_plans_at_every_density(name: str, density: float | None, geometry: TokenGeometry) -> None:
    qkv = _qkv(geometry)
    plan = _plan(name, geometry, qkv, **({} if density is None else {"density": density}))
    levels = plan.mask.levels()
    assert ((levels > 0).sum(-1) > 0).all()
    block_q, block_k = plan.mask.block_q, plan.mask.block_k
    place = torch.arange(geometry.tokens)
    moved = plan.order is not None
    text = (
        place >= geometry.visual if moved else (place < geometry.prefix) | (place >= geometry.prefix + geometry.visual)
    )
    assert (levels[..., (place[text] // block_q).unique(), :] > 0).all()
    assert (levels[..., (place[text] // block_k).unique()] > 0).all()
    tokens = (levels > 0).repeat_interleave(block_q, 2).repeat_interleave(block_k, 3)
    kept = tokens[..., : geometry.tokens, : geometry.tokens].float().mean((2, 3))
    torch.testing.assert_close(plan.density.expand(kept.shape), kept, atol=1e-5, rtol=1e-4)
    out = execute(plan, *qkv, scale=None, key_valid=None, backend=None)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("density", [0.5, 0.3, 0.2])
@pytest.mark.parametrize("name", PRESETS)
def test_density_is_met_where_blocks_are_small_against_the_map(name: str, density: float) -> None:
    geometry = TokenGeometry((16, 24, 24))
    heads = 1
    qkv = _qkv(geometry, heads, 16) if get_method(name).plans_from_data else (torch.zeros(1, heads, 1, 1),) * 3
    plan = _plan(name, geometry, qkv, density=density)
    assert plan.density.mean().item() == pytest.approx(density, rel=0.25), name


@pytest.mark.parametrize("geometry", [FLUX, HUNYUAN, RAGGED], ids=str)
@pytest.mark.parametrize("name", PRESETS)
def test_density_one_equals_dense(name: str, geometry: TokenGeometry) -> None:
    q, k, v = _qkv(geometry, batch=2)
    plan = _plan(name, geometry, (q, k, v), density=1.0)
    assert plan.density.min() == 1.0
    out = execute(plan, q, k, v, scale=None, key_valid=None, backend=None)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", PRESETS)
def test_orders_go_there_and_back_bit_exactly(name: str) -> None:
    q, k, v = _qkv(HUNYUAN)
    plan = _plan(name, HUNYUAN, (q, k, v), density=0.3)
    if plan.order is None:
        assert get_method(name).order == ("raster",)
        return
    assert torch.equal(unpermute_tokens(permute_tokens(q, plan.order), plan.order), q)
    for row in plan.order.table:
        assert torch.equal(row[inverse_index(row).long()], torch.arange(HUNYUAN.tokens, dtype=torch.int32))


@pytest.mark.parametrize("name", PRESETS)
def test_skipped_blocks_are_not_read(name: str) -> None:
    q, k, v = _qkv(HUNYUAN, heads=1)
    plan = _plan(name, HUNYUAN, (q, k, v), density=0.2)
    clean = execute(plan, q, k, v, scale=None, key_valid=None, backend=None)
    order = torch.arange(HUNYUAN.tokens) if plan.order is None else plan.order.table[plan.order.head[0]].long()
    block = plan.mask.block_q
    levels = plan.mask.levels()[0, 0]
    tried = 0
    for row in range(0, len(levels), 7):
        skipped = (levels[row] == 0).nonzero()[:, 0]
        if not len(skipped):
            continue
        tried += 1
        keys = torch.cat([order[j * block : (j + 1) * block] for j in skipped.tolist()])
        k2, v2 = k.clone(), v.clone()
        k2[:, :, keys], v2[:, :, keys] = torch.nan, torch.nan
        queries = order[row * block : (row + 1) * block]
        out = execute(plan, q, k2, v2, scale=None, key_valid=None, backend=None)
        assert torch.equal(out[:, :, queries], clean[:, :, queries])
    assert tried or name == "streaming"
