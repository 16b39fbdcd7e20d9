"""Sparse VideoGen: heads planted as spatial or temporal are told apart by the error of sampled queries."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dit_accel.choice.mse import candidate_errors, sampled_queries
from dit_accel.context import PlanContext
from dit_accel.geometry import TokenGeometry
from dit_accel.planner import Planner
from dit_accel.presets import get_method

CPU = torch.device("cpu")
GEOMETRY = TokenGeometry((9, 12, 12), suffix=20)


def _planted(orders: tuple[str, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Heads that look at what is near along the sequence in one of two orders."""
    frames, height, width = GEOMETRY.axes
    natural = torch.arange(GEOMETRY.visual)
    place = {"fhw": natural, "hwf": natural.view(frames, height * width).T.reshape(-1).argsort()}
    gen = torch.Generator().manual_seed(0)
    heads = []
    for order in orders:
        angle = place[order].float() * (2 * torch.pi / GEOMETRY.visual)
        waves = torch.arange(1, 17).float() * angle[:, None]
        heads.append(torch.cat([waves.cos(), waves.sin()], -1))
    visual = torch.stack(heads)[None]
    text = torch.randn(1, len(orders), GEOMETRY.suffix, 32, generator=gen) * 0.1
    key = torch.cat((visual, text), 2)
    return 4 * key, key, torch.randn(key.shape, generator=gen)


def _context(planner: Planner, qkv: tuple[Tensor, Tensor, Tensor], valid: Tensor | None = None) -> PlanContext:
    density = planner.method.density_at(0)
    return planner.context(*qkv, None, GEOMETRY, density=density, scale=None, key_valid=valid)


def test_heads_are_told_apart() -> None:
    orders = ("fhw", "hwf", "hwf", "fhw")
    planner = Planner(get_method("svg1"))
    plan = planner.plan(_context(planner, _planted(orders)))
    assert plan.order is not None
    assert tuple(plan.order_names[i] for i in plan.order.head.tolist()) == orders
    assert plan.cost == pytest.approx(64 / GEOMETRY.tokens * 2)
    assert planner.costs(GEOMETRY) == (pytest.approx(plan.cost), pytest.approx(plan.cost))


@pytest.mark.parametrize("masked", [False, True])
def test_errors_equal_loops_over_sampled_queries(masked: bool) -> None:
    q, k, v = _planted(("fhw", "hwf"))
    valid = torch.ones(1, GEOMETRY.tokens, dtype=torch.bool)
    valid[:, -7:] = not masked
    planner = Planner(get_method("svg1"))
    ctx = _context(planner, (q, k, v), valid if masked else None)
    layout = planner.layout(GEOMETRY, CPU)
    planner.plan(ctx)
    assert layout.table is not None
    errors = candidate_errors(ctx, layout.table)
    levels = ctx.candidate_levels
    assert levels is not None
    kept = levels[0].tolist()
    rows = sampled_queries(GEOMETRY, CPU).tolist()
    for n, order in enumerate(layout.table.tolist()):
        position = {token: i for i, token in enumerate(order)}
        for head in range(2):
            total = 0.0
            for row in rows:
                logits = (q[0, head, row] @ k[0, head].T) / 32**0.5
                logits[~valid[0]] = -torch.inf
                exact = logits.softmax(0) @ v[0, head]
                hidden: list[int] = []
                for token in range(GEOMETRY.tokens):
                    if kept[n][position[row] // 64][position[token] // 64] == 0:
                        hidden.append(token)
                logits[hidden] = -torch.inf
                total += float((logits.softmax(0) @ v[0, head] - exact).square().mean()) / len(rows)
            assert float(errors[n, head]) == pytest.approx(total, rel=1e-3, abs=1e-7)


def test_sampled_queries_are_visual_distinct_and_at_all_places_of_a_block() -> None:
    geometry = TokenGeometry((16, 16, 16), prefix=11)
    rows = sampled_queries(geometry, CPU)
    assert len(rows.unique()) == 64
    assert int(rows.min()) >= 11
    assert int(rows.max()) < geometry.tokens
    assert len((rows % 64).unique()) > 40
    assert len(sampled_queries(TokenGeometry((1, 3, 3)), CPU)) == 9


def test_images_have_one_order_and_no_sink() -> None:
    geometry = TokenGeometry((1, 24, 24), prefix=30)
    q = torch.randn(1, 2, geometry.tokens, 16)
    planner = Planner(get_method("svg1"))
    plan = planner.plan(planner.context(q, q, q, None, geometry, density=0.3, scale=None))
    assert plan.order is None
    assert plan.density.item() == pytest.approx(0.3, abs=0.08)


def test_the_choice_needs_a_pattern() -> None:
    with pytest.raises(ValueError, match="order_choice='mse' goes with a pattern, got score='mass'"):
        get_method("svg1").replace(score="mass")
    with pytest.raises(ValueError, match="pattern 'window' has no candidates"):
        get_method("na").replace(static=True)
