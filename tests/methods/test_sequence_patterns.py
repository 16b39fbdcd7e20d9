"""Bands, sinks and radial masks against loops over tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dit_accel.geometry import TokenGeometry
from dit_accel.method import Method
from dit_accel.order import order_index
from dit_accel.pattern import PatternContext, make_pattern
from dit_accel.pattern.radial import RadialRule

GEOMETRIES = [TokenGeometry((4, 6, 8)), TokenGeometry((3, 5, 7), prefix=10), TokenGeometry((1, 12, 12), suffix=6)]


def _levels(score: str, geometry: TokenGeometry, order: str = "raster", density: float | None = None) -> Tensor:
    method = Method(name="x", score=score, order=(order,), block_q=16, block_k=16)
    index = order_index(order, geometry)
    return make_pattern(PatternContext(method, geometry, index, density, 2)).levels[0, 0]


def _any_block(mask: Tensor) -> Tensor:
    blocks = -(-len(mask) // 16)
    padded = torch.zeros(blocks * 16, blocks * 16, dtype=torch.bool)
    padded[: len(mask), : len(mask)] = mask
    return padded.view(blocks, 16, blocks, 16).any(3).any(1)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("width", [1, 16, 40])
@pytest.mark.parametrize("order", ["raster", "hwf"])
def test_band_and_first_frame(geometry: TokenGeometry, width: int, order: str) -> None:
    found = _levels(f"band:{width}", geometry, order)
    index = order_index(order, geometry)
    tokens = list(range(geometry.tokens)) if index is None else index.tolist()
    frame = geometry.axes[1] * geometry.axes[2]
    by_frame = index is None  # an image, or raster
    mask = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for a in range(len(tokens)):
        for b, token in enumerate(tokens):
            sink = by_frame and geometry.is_video and 0 <= token - geometry.prefix < frame
            mask[a, b] = abs(a - b) < width or sink
    assert torch.equal(found > 0, _any_block(mask))
    without = _levels(f"band:{width},sink=false", geometry, order)
    assert bool((without <= found).all())
    assert bool((without < found).any()) == bool((found != without).any())


@pytest.mark.parametrize("geometry", [*GEOMETRIES, TokenGeometry.flat(150, prefix=4)], ids=str)
def test_streaming_sees_the_start_and_what_is_near(geometry: TokenGeometry) -> None:
    found = _levels("streaming:sink=20,local=40", geometry)
    tokens = geometry.tokens
    place = torch.arange(tokens)
    near = (place[:, None] - place).abs() <= 20
    sink = (place >= geometry.prefix) & (place < geometry.prefix + 20)
    assert torch.equal(found > 0, _any_block(near | sink))


def _radial_mask(rule: RadialRule, decay: float) -> Tensor:
    """Visible token pairs from the formula of the paper, at scale 1."""
    total = rule.frames * rule.per_frame
    mask = torch.zeros(total, total, dtype=torch.bool)
    for a in range(total):
        for b in range(total):
            distance = abs(a // rule.per_frame - b // rule.per_frame)
            apart = abs(a % rule.per_frame - b % rule.per_frame)
            sink = b < rule.per_frame and rule.sink
            if sink or distance <= 1:
                mask[a, b] = True
            else:
                natural = 2 ** rule.per_frame.bit_length() / 2 ** distance.bit_length()
                skipped = natural < rule.block and distance % int(rule.block / natural) != 0
                mask[a, b] = not skipped and apart < max(rule.block, natural * decay)
    return mask


@pytest.mark.parametrize("prefix", [0, 7])
@pytest.mark.parametrize(
    ("grid", "decay", "sink"), [((7, 5, 9), 0.9, True), ((9, 3, 4), 0.2, False), ((4, 6, 8), 1.0, True)]
)
def test_radial_follows_the_published_rule(grid: tuple[int, int, int], decay: float, sink: bool, prefix: int) -> None:
    geometry = TokenGeometry(grid, prefix=prefix)
    rule = RadialRule(grid[0], grid[1] * grid[2], 16, decay, sink)
    mask = _radial_mask(rule, decay)
    found = _levels(f"radial:{decay},sink={str(sink).lower()}", geometry) > 0
    blocks = len(found)
    for row in range(blocks):
        queries = [t - prefix for t in range(row * 16, row * 16 + 16) if 0 <= t - prefix < geometry.visual]
        for column in range(blocks):
            keys = [t - prefix for t in range(column * 16, column * 16 + 16) if 0 <= t - prefix < geometry.visual]
            seen = [sum(bool(mask[q, k]) for q in queries) for k in keys]
            busy = sum(3 * count > len(queries) for count in seen)
            filled = sum(count > 0 for count in seen)
            assert bool(found[row, column]) == (row == column or busy > 0.6 * filled), (row, column)
    assert bool(found.diagonal().all())


def test_radial_narrows_with_distance_and_meets_densities() -> None:
    rule = RadialRule(21, 1560, 64, 0.95, True)
    widths = rule.widths.tolist()
    assert widths[:5] == [1560, 1560, 487, 487, 244]  # 2048 / 4 * 0.95 and 2048 / 8 * 0.95, rounded up
    assert [w for d, w in enumerate(widths) if d >= 16] == [64] * 5  # 2048 / 32 = 64 is a whole block still
    geometry = TokenGeometry((16, 16, 16))
    shares = [(_levels("radial", geometry, density=d) > 0).float().mean().item() for d in (0.1, 0.2, 0.4, 0.7, 1.0)]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert shares[2] == pytest.approx(0.4, abs=0.08)


def test_radial_needs_raster_order() -> None:
    with pytest.raises(ValueError, match="radial attention needs order 'raster', got \\('hwf',\\)"):
        _levels("radial", TokenGeometry((4, 6, 8)), order="hwf")
