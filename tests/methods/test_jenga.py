"""Jenga: neighbours on the grid, the first frame and the larger of two budgets."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.geometry import TokenGeometry
from dit_accel.order import order_index
from dit_accel.presets import get_method
from tests.methods._scored import FLUX, SMALL, context, inputs, plan, scores

BLOCK = 16


def _block_of(order: str, geometry: TokenGeometry) -> dict[tuple[int, int, int], int]:
    index = order_index(order, geometry)
    place = {int(t): i for i, t in enumerate(index.tolist())} if index is not None else None
    _, height, width = geometry.axes
    found = {}
    for n in range(geometry.visual):
        token = geometry.prefix + n
        position = token if place is None else place[token]
        found[n // (height * width), n // width % height, n % width] = position // BLOCK
    return found


def _kept(order: str, geometry: TokenGeometry, blocks: int) -> Tensor:
    block = _block_of(order, geometry)
    kept = torch.zeros(blocks, blocks, dtype=torch.bool)
    for (f, y, x), mine in block.items():
        for (g, w, z), other in block.items():
            if max(abs(f - g), abs(y - w), abs(x - z)) <= 1:
                kept[mine, other] = True
            if geometry.axes[0] > 1 and g == 0:
                kept[:, other] = True
    return kept


def test_neighbours_and_first_frame() -> None:
    for geometry in (SMALL, TokenGeometry((1, 9, 11), prefix=7)):
        for order in ("gilbert", "raster"):
            q, k, v = inputs(geometry)
            got = scores("jenga", q, k, v, geometry, order=(order,), block_q=BLOCK, block_k=BLOCK)
            assert got.insist is not None
            want = _kept(order, geometry, got.values.shape[2])
            assert torch.equal(got.insist[0, 0], want), (geometry, order)
            assert not want.all()


def test_the_larger_of_two_budgets_decides() -> None:
    geometry = FLUX
    q, k, v = inputs(geometry)
    method = get_method("jenga").replace(block_q=32, block_k=32, select="top_k_or_p:0.1,mass=0.6")
    ctx = context(method, q, k, v, geometry)
    got = scores("jenga", q, k, v, geometry, block_q=32, block_k=32)
    assert got.insist is not None
    levels = plan(method, q, k, v, geometry).mask.levels()
    blocks = got.values.shape[3]
    budgets = set()
    for head in range(3):
        for i in range(blocks):
            row = got.values[0, head, i]
            by_mass, mass = 0, 0.0
            ranked = row.argsort(descending=True, stable=True).tolist()
            for j in ranked:
                if mass >= 0.6 * float(row.sum()):
                    break
                mass, by_mass = mass + float(row[j]), by_mass + 1
            count = max(round(0.1 * blocks), by_mass)
            budgets.add(by_mass > round(0.1 * blocks))
            kept = torch.zeros(blocks, dtype=torch.bool)
            kept[ranked[:count]] = True
            kept |= got.insist[0, head, i] | ctx.forced.cols | ctx.forced.rows[i]
            assert torch.equal(levels[0, head, i] > 0, kept)
    assert budgets == {True, False}


def test_text_has_no_part_in_the_softmax() -> None:
    q, k, v = inputs(FLUX)
    ctx = context(get_method("jenga"), q, k, v, FLUX)
    got = scores("jenga", q, k, v, FLUX)
    assert (got.values[..., ctx.forced.cols] == 0).all()
    torch.testing.assert_close(got.values.sum(-1), torch.ones(1, 3, got.values.shape[2]))


def test_each_head_has_the_neighbours_of_its_own_order() -> None:
    q, k, v = inputs(SMALL)
    method = get_method("jenga").replace(
        order=("gilbert", "hwf"), order_choice="by_layer", block_q=BLOCK, block_k=BLOCK
    )
    for layer, order in enumerate(method.order):
        made = plan(method, q, k, v, SMALL, layer=layer)
        want = _kept(order, SMALL, made.mask.key_blocks)
        assert (made.mask.levels()[0] > 0)[:, want].all()
