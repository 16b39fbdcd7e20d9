"""Planner and plan execution against dense attention and loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dit_accel.choice.paro import paro_scores
from dit_accel.choice.recall import order_recall
from dit_accel.geometry import TokenGeometry
from dit_accel.order import AXIS_ORDERS, order_index
from dit_accel.plan import Plan, execute
from dit_accel.planner import Planner
from dit_accel.presets import get_method
from dit_accel.score import block_scores
from dit_accel_kernels import dense_attention

CPU = torch.device("cpu")
GRID = TokenGeometry((6, 9, 7))
CUBE = TokenGeometry((16, 16, 16))  # a block of 64 is a quarter of a slice, so all six orders differ


def _qkv(tokens: int, seed: int = 0, heads: int = 2, batch: int = 1, dim: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    shape = (batch, tokens, heads, dim)
    q, k, v = (torch.randn(shape, generator=gen).transpose(1, 2) for _ in range(3))
    return q, k, v


def _plan(name: str, q: Tensor, k: Tensor, v: Tensor, geometry: TokenGeometry, **changes: object) -> Plan:
    method = get_method(name).replace(**changes) if changes else get_method(name)
    planner = Planner(method)
    if not method.plans_from_data:
        return planner.pattern_plan(geometry, CPU, method.density_at(0), q.shape[1])
    _, lse = dense_attention(q, k, v, scale=None, key_valid=None)
    return planner.plan(planner.context(q, k, v, lse, geometry, density=method.density_at(0), scale=None))


def _run(plan: Plan, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return execute(plan, q, k, v, scale=None, key_valid=None, backend=None)


@pytest.mark.parametrize("geometry", [GRID, TokenGeometry((6, 9, 7), prefix=10), TokenGeometry((1, 20, 19), suffix=7)])
@pytest.mark.parametrize("name", ["auto", "adaspa", "paro", "na"])
def test_everything_kept_equals_dense(name: str, geometry: TokenGeometry) -> None:
    q, k, v = _qkv(geometry.tokens, batch=2)
    changes: dict[str, object] = {"window": -1, "stride": 1} if name == "na" else {"density": 1.0}
    plan = _plan(name, q, k, v, geometry, **changes)
    assert plan.density.min() == 1.0
    torch.testing.assert_close(_run(plan, q, k, v), F.scaled_dot_product_attention(q, k, v), atol=1e-5, rtol=1e-5)


def _planted(order: str, seed: int) -> tuple[Tensor, Tensor]:
    """One head that looks at its neighbours in ``order`` only."""
    index = order_index(order, CUBE)
    place = torch.arange(CUBE.tokens) if index is None else index.long().argsort()
    angle = place.float() * (2 * torch.pi / CUBE.tokens)
    waves = torch.arange(1, 33).float() * angle[:, None]
    features = torch.cat([waves.cos(), waves.sin()], -1) * 3
    noise = torch.randn(CUBE.tokens, 64, generator=torch.Generator().manual_seed(seed)) * 0.1
    return features + noise, features


def test_planted_axis_orders_are_found() -> None:
    """Each head is planted with one of the six axis orders; the recalled mass must name it."""
    heads = [_planted(order, i) for i, order in enumerate(AXIS_ORDERS)]
    q, k = (torch.stack(part)[None] for part in zip(*heads, strict=True))
    method = get_method("paro").replace(density=0.05)
    planner = Planner(method)
    _, lse = dense_attention(q, k, k, scale=None, key_valid=None)
    table = planner.layout(CUBE, CPU).table
    assert table is not None
    recall = order_recall(planner.context(q, k, k, lse, CUBE, density=0.05, scale=None), table)
    assert [method.order[i] for i in recall.argmax(0).tolist()] == list(AXIS_ORDERS)


def test_paro_metric_follows_its_formula() -> None:
    """Loops over blocks of the map, straight from the definition."""
    geometry = TokenGeometry((4, 8, 8))
    q, k, _ = _qkv(256, seed=5)
    q = q * 4.5
    _, lse = dense_attention(q, k, k, scale=None, key_valid=None)
    table = Planner(get_method("paro")).layout(geometry, CPU).table
    assert table is not None
    rows = torch.tensor([0, 2], dtype=torch.int32)
    scores = paro_scores(q, k, lse, table, rows, block_q=64, block_k=64, scale=None, alpha=0.3)
    probs = (q @ k.mT / 8).softmax(-1)[0]
    sparse, spread = torch.zeros(len(table), 2), torch.zeros(len(table), 2)
    for n, order in enumerate(table.long()):
        for head in range(2):
            blocks = [
                probs[head][order[r * 64 : (r + 1) * 64]][:, order[c * 64 : (c + 1) * 64]]
                for r in (0, 2)
                for c in range(4)
            ]
            empty = [float((block < 1e-3).float().mean() >= 0.9) for block in blocks]
            sparse[n, head] = sum(empty) / len(blocks)
            spread[n, head] = sum(float(block.max() / block.mean()) for block in blocks) / len(blocks)
    busy = 1 - sparse
    metric = 0.3 * busy / busy.sum(0).clamp(min=1e-12) + 0.7 * spread / spread.sum(0)
    assert 0 < sparse.mean() < 1
    torch.testing.assert_close(scores, -metric, atol=1e-5, rtol=1e-4)


def test_mass_scores_equal_the_softmax_map() -> None:
    q, k, v = _qkv(GRID.tokens)
    planner = Planner(get_method("adaspa"))
    _, lse = dense_attention(q, k, v, scale=None, key_valid=None)
    ctx = planner.context(q, k, v, lse, GRID, density=0.2, scale=None)
    mass = block_scores(ctx).values
    probs = (q @ k.mT / 8).softmax(-1)
    blocks = -(-GRID.tokens // 64)
    for i in range(blocks):
        for j in range(blocks):
            block = probs[:, :, i * 64 : (i + 1) * 64, j * 64 : (j + 1) * 64]
            torch.testing.assert_close(mass[:, :, i, j], block.sum(-1).mean(-1), atol=1e-5, rtol=1e-4)
    assert ctx.cost == 0.5


def test_text_stays_exact_as_query_and_as_key() -> None:
    geometry = TokenGeometry((6, 9, 7), prefix=20)
    q, k, v = _qkv(geometry.tokens)
    for changes in ({}, {"compensate": "drop"}, {"order": ("raster",), "order_choice": "fixed"}):
        plan = _plan("auto", q, k, v, geometry, density=0.2, **changes)
        out = _run(plan, q, k, v)
        dense = F.scaled_dot_product_attention(q, k, v)
        torch.testing.assert_close(out[:, :, :20], dense[:, :, :20], atol=1e-5, rtol=1e-5)
        assert (out - dense).abs().max() > 1e-3
        levels = plan.mask.levels()
        text_blocks = [0] if plan.order is None else [geometry.visual // 64, (geometry.tokens - 1) // 64]
        assert (levels[..., text_blocks] == 1).all()


def test_skipped_blocks_are_not_read() -> None:
    q, k, v = _qkv(GRID.tokens)
    plan = _plan("adaspa", q, k, v, GRID, density=0.3)
    clean = _run(plan, q, k, v)
    levels = plan.mask.levels()[0]
    for head in range(2):
        for row in range(levels.shape[1]):
            k2, v2 = k.clone(), v.clone()
            for col in (levels[head, row] == 0).nonzero()[:, 0].tolist():
                k2[:, head, col * 64 : (col + 1) * 64] = float("nan")
                v2[:, head, col * 64 : (col + 1) * 64] = float("nan")
            rows = slice(row * 64, (row + 1) * 64)
            assert torch.equal(_run(plan, q, k2, v2)[:, head, rows], clean[:, head, rows])


def test_compensation_brings_the_output_closer() -> None:
    """Smooth keys: a mean speaks for its block."""
    gen = torch.Generator().manual_seed(3)
    smooth = torch.randn(1, 2, 6, 64, generator=gen).repeat_interleave(64, 2)[:, :, : GRID.tokens]
    q, _, _ = _qkv(GRID.tokens)
    k = smooth + 0.05 * torch.randn(smooth.shape, generator=gen)
    v = smooth.flip(-1) + 0.05 * torch.randn(smooth.shape, generator=gen)
    dense = F.scaled_dot_product_attention(q, k, v)
    errors = {}
    for compensate in ("drop", "mean"):
        plan = _plan("adaspa", q, k, v, GRID, density=0.2, select="top_k", compensate=compensate)
        errors[compensate] = (_run(plan, q, k, v) - dense).norm() / dense.norm()
    assert errors["mean"] < 0.2 * errors["drop"]


def test_window_density_counts_visited_blocks() -> None:
    q, k, v = _qkv(TokenGeometry((9, 16, 16)).tokens)
    for name in ("na", "gna", "dina"):
        plan = _plan(name, q, k, v, TokenGeometry((9, 16, 16)), density=0.4)
        assert plan.density.item() == pytest.approx(0.4, abs=0.16)  # few windows fit a grid of so few bricks


def test_windows_need_a_grid() -> None:
    q, _, _ = _qkv(300)
    with pytest.raises(ValueError, match="needs a grid"):
        Planner(get_method("na")).pattern_plan(TokenGeometry.flat(300), q.device, 0.3, 2)


def test_images_drop_equal_axis_orders() -> None:
    layout = Planner(get_method("auto")).layout(TokenGeometry((1, 16, 16)), CPU)
    assert layout.names == ("fhw", "fwh", "brick2d")


def test_planner_keeps_few_geometries() -> None:
    planner = Planner(get_method("auto"))
    for height in range(2, 30):
        planner.layout(TokenGeometry((2, height, 3)), CPU)
    assert len(planner._layouts) <= 8
