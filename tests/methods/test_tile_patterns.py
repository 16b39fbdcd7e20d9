"""Sliding tiles, power-of-two distances, halos and dilated bricks against loops over tokens."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch

from dit_accel.geometry import TokenGeometry
from dit_accel.method import Method
from dit_accel.order import order_index
from dit_accel.pattern import Pattern, PatternContext, make_pattern
from dit_accel.pattern.power import reaches
from dit_accel.pattern.power import visible_tiles as power_tiles
from dit_accel.pattern.sta import tile_windows
from dit_accel.planner import Planner
from dit_accel.presets import get_method

Token = tuple[int, ...]
GEOMETRIES = [TokenGeometry((4, 8, 8)), TokenGeometry((5, 7, 9), prefix=9), TokenGeometry((1, 13, 12), suffix=5)]


def _made(score: str, geometry: TokenGeometry, order: str = "brick", **fields: object) -> tuple[Pattern, list[int]]:
    method = Method(name="x", score=score, order=(order,), **{"block_q": 16, "block_k": 16, **fields})
    index = order_index(order, geometry)
    made = make_pattern(PatternContext(method, geometry, index, None, 2))
    return made, list(range(geometry.tokens)) if index is None else index.tolist()


def _place(token: int, geometry: TokenGeometry) -> Token | None:
    visual = token - geometry.prefix
    _, height, width = geometry.axes
    if not 0 <= visual < geometry.visual:
        return None
    return visual // (height * width), visual // width % height, visual % width


def _pairs(levels: torch.Tensor, order: list[int], geometry: TokenGeometry) -> Iterator[tuple[int, bool]]:
    """Level of each block pair, and the block's visual token pairs."""
    places = [_place(token, geometry) for token in order]
    blocks = [[p for p in places[i : i + 16] if p is not None] for i in range(0, len(places), 16)]
    for (a, queries), (b, keys) in itertools.product(enumerate(blocks), repeat=2):
        yield int(levels[0, 0, a, b]), list(itertools.product(queries, keys))


def _check_any(made: Pattern, order: list[int], geometry: TokenGeometry, sees: Callable[[Token, Token], bool]) -> None:
    """A block is computed iff some pair of its visual tokens is visible."""
    assert made.windows is None
    for level, pairs in _pairs(made.levels, order, geometry):
        assert level == int(any(sees(q, k) for q, k in pairs))


def _centred(place: int, count: int, window: int) -> range:
    window = min(window, count)
    start = min(max(place - window // 2, 0), count - window)
    return range(start, start + window)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("window", [(1, 2, 3), (2, 1, 1), (3, 3, 3)])
def test_sta_sees_tiles_around_its_own(geometry: TokenGeometry, window: Token) -> None:
    tile = (2, 4, 2)
    made, order = _made("sta:{}x{}x{},tile=2x4x2".format(*window), geometry, order="brick:2x4x2")
    counts = [math.ceil(n / t) for n, t in zip(geometry.axes, tile, strict=True)]

    def sees(query: Token, key: Token) -> bool:
        return all(
            k // t in _centred(q // t, n, w) for q, k, t, n, w in zip(query, key, tile, counts, window, strict=True)
        )

    _check_any(made, order, geometry, sees)


def test_sta_on_tiles_that_divide_the_grid_is_block_sparse_and_equals_gna() -> None:
    """With odd windows a window of tiles is NATTEN's window with the tile as stride."""
    geometry = TokenGeometry((8, 12, 16))
    index = order_index("brick", geometry)
    sta = get_method("sta").replace(density=None, score="sta:1x3x3", order=("brick",))
    gna = get_method("gna").replace(window=(4, 12, 12), stride=(4, 4, 4))
    first, second = (make_pattern(PatternContext(m, geometry, index, None, 1)).levels for m in (sta, gna))
    assert set(second.unique().tolist()) == {0, 1}
    assert torch.equal(first, second)


def test_sta_windows_reach_from_one_tile_to_all() -> None:
    windows = tile_windows((5, 6, 10))
    assert windows[0] == (1, 1, 1)
    assert windows[-1] == (5, 6, 10)
    assert all(all(a <= b for a, b in zip(*pair, strict=True)) for pair in itertools.pairwise(windows))


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("radius", [0, 1])
def test_power_sees_neighbours_and_powers_of_two(geometry: TokenGeometry, radius: int) -> None:
    tile = (1, 2, 2)
    made, order = _made(f"power:{radius},tile=1x2x2", geometry, order="brick:1x2x2", block_q=16)

    def sees(query: Token, key: Token) -> bool:
        far = [abs(q // t - k // t) for q, k, t in zip(query, key, tile, strict=True)]
        beyond = [d for d in far if d > radius]
        return len(beyond) <= 1 and all(bin(d).count("1") == 1 for d in beyond)

    _check_any(made, order, geometry, sees)


def test_power_reaches_grow_and_one_tile_reaches_all_within_the_logarithm() -> None:
    counts = (3, 5, 9)
    maps = [power_tiles(counts, reach) for reach in reaches(counts)]
    assert torch.equal(maps[0], torch.eye(135, dtype=torch.bool))
    assert maps[-1].all()
    assert all(bool((b | ~a).all()) for a, b in itertools.pairwise(maps))
    cross = power_tiles(counts, ((0, 0, 0), 3)).float()
    hops = 2 + 3 + 4  # ceil(log2) of each axis, one more than a binary number has digits
    assert (torch.linalg.matrix_power(cross.double(), hops) > 0).all()


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("halo", [0, 1, 3])
def test_halo_sees_its_block_and_what_is_around(geometry: TokenGeometry, halo: int) -> None:
    size = (2, 4, 2)
    made, order = _made(f"halo:{halo},size=2x4x2", geometry, order="brick:2x4x2")
    windows = made.windows
    assert windows is not None

    def sees(query: Token, key: Token) -> bool:
        return all(q // s * s - halo <= k < q // s * s + s + halo for q, k, s in zip(query, key, size, strict=True))

    for a, query in enumerate(order):
        q = _place(query, geometry)
        inside = (windows.q_lo[:, a, None] <= windows.k_code) & (windows.k_code < windows.q_hi[:, a, None])
        found = (inside.all(0) | (windows.k_code[0] < 0)).tolist()
        places = [_place(key, geometry) for key in order]
        assert found == [q is None or p is None or sees(q, p) for p in places]
    for level, pairs in _pairs(made.levels, order, geometry):
        visible = [sees(q, k) for q, k in pairs]
        if len(pairs) == 256:
            assert level == (0 if not any(visible) else 1 if all(visible) else 255)


def test_dilated_bricks_hold_one_residue_each() -> None:
    geometry = TokenGeometry((4, 16, 16))
    index = order_index("brick:2x4x4,dilation=1x2x2", geometry)
    assert index is not None
    for block in index.view(-1, 32).tolist():
        places = torch.tensor([_place(token, geometry) for token in block])
        assert len({(int(h) % 2, int(w) % 2) for _, h, w in places}) == 1
        spread = places.max(0).values - places.min(0).values
        assert spread.tolist() == [1, 6, 6]
    assert sorted(index.tolist()) == list(range(geometry.tokens))


@pytest.mark.parametrize("density", [0.25, 0.2, 0.1])
def test_dina_keeps_its_dilation_up_to_a_quarter_and_wastes_little(density: float) -> None:
    """Bricks of every other token waste less than half as much as plain bricks do."""
    geometry = TokenGeometry((8, 32, 32))
    visible = []
    for order in ("brick:dilation=1x2x2", "brick"):
        method = get_method("dina").replace(order=(order,))
        plan = Planner(method).pattern_plan(geometry, torch.device("cpu"), density, 1)
        windows = plan.windows
        assert windows is not None
        if order != "brick":
            assert plan.density.item() == pytest.approx(density, rel=0.05)
        span = (windows.q_hi - windows.q_lo).float().mean(1)
        visible.append(float(span.prod()) / geometry.tokens / plan.density.item())
    assert visible[0] > 2 * visible[1]
    other = int((plan.order.table[0] == 1).nonzero()) if plan.order is not None else 0  # column 1: the other residue
    assert int(windows.k_code[2, other]) == 16


@pytest.mark.parametrize(
    ("score", "message"),
    [
        ("sta", "needs a window in tiles or a density"),
        ("sta:0x1x1", "a window in tiles must be"),
        ("sta:2x2x2,tile=4", "size of a brick must be"),
        ("power:-1", "radius must be a number of tiles"),
        ("halo:1.5", "halo must be a number of tokens"),
        ("inward:5", "a window must be HxW"),
        ("radial:0", "decay must be above 0"),
        ("streaming:-4", "sink must be a number of tokens"),
        ("band", "needs a width or a density"),
    ],
)
def test_bad_parameters_raise(score: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _made(score, TokenGeometry((4, 8, 8)), order="raster")
