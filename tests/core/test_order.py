import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel import order as orders
from dit_accel.geometry import TokenGeometry
from dit_accel.order import (
    AXIS_ORDERS,
    ORDERS,
    clear_caches,
    extra_blocks,
    inverse_index,
    order_index,
    token_order,
    visual_first,
)
from dit_accel_kernels.types import TokenOrder

GRIDS = [(1, 1, 1), (21, 45, 80), (13, 30, 45), (1, 64, 64), (5, 1, 7), (1, 1, 9), (2, 3, 1), (3, 5, 7)]
ALL = [*AXIS_ORDERS, "raster", "morton", "gilbert", "brick:4x4x4", "brick:3x2x5", "brick:8x16"]


def coordinates(visual, grid):
    _, height, width = grid
    return torch.stack((visual // (height * width), visual // width % height, visual % width), 1)


def steps(visual, grid):
    place = coordinates(visual, grid)
    return (place[1:] - place[:-1]).abs()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_bijection(name, grid):
    geometry = TokenGeometry(grid, prefix=3, suffix=2)
    index = order_index(name, geometry)
    if index is None:
        assert torch.equal(ORDERS.create(name, grid), torch.arange(geometry.visual))
        return
    assert index.dtype == torch.int32
    assert index.shape == (geometry.tokens,)
    assert torch.equal(index.sort().values, torch.arange(geometry.tokens, dtype=torch.int32))
    assert index[-5:].tolist() == [0, 1, 2, geometry.tokens - 2, geometry.tokens - 1]


small_grids = st.tuples(st.integers(1, 9), st.integers(1, 12), st.integers(1, 12))


@settings(deadline=None, max_examples=150)
@given(small_grids, st.sampled_from(ALL), st.integers(0, 3), st.integers(0, 3))
def test_bijection_of_any_grid(grid, name, prefix, suffix):
    geometry = TokenGeometry(grid, prefix, suffix)
    index = order_index(name, geometry)
    if index is not None:
        assert torch.equal(index.sort().values, torch.arange(geometry.tokens, dtype=torch.int32))
        assert torch.equal(index[inverse_index(index).long()], torch.arange(geometry.tokens, dtype=torch.int32))


def test_axis_orders_in_paro_numbering():
    grid = (2, 3, 4)
    natural = [(f, h, w) for f in range(2) for h in range(3) for w in range(4)]
    wanted = {
        0: sorted(natural, key=lambda c: (c[0], c[1], c[2])),
        1: sorted(natural, key=lambda c: (c[0], c[2], c[1])),
        2: sorted(natural, key=lambda c: (c[1], c[2], c[0])),
        3: sorted(natural, key=lambda c: (c[1], c[0], c[2])),
        4: sorted(natural, key=lambda c: (c[2], c[1], c[0])),
        5: sorted(natural, key=lambda c: (c[2], c[0], c[1])),
    }
    assert AXIS_ORDERS == ("fhw", "fwh", "hwf", "hfw", "whf", "wfh")
    for code, name in enumerate(AXIS_ORDERS):
        got = coordinates(ORDERS.create(name, grid), grid)
        assert [tuple(c) for c in got.tolist()] == wanted[code], name


def test_innermost_axis_is_the_last_letter():
    visual = ORDERS.create("hwf", (5, 3, 4))
    assert coordinates(visual, (5, 3, 4))[:5].tolist() == [[f, 0, 0] for f in range(5)]


@pytest.mark.parametrize(("grid", "size"), [((5, 7, 9), (2, 3, 4)), ((1, 64, 64), (1, 8, 8)), ((4, 4, 4), (9, 2, 2))])
def test_bricks_are_contiguous_and_raster_inside(grid, size):
    visual = ORDERS.create(f"brick:{'x'.join(map(str, size))}", grid)
    place = coordinates(visual, grid)
    brick = [tuple(c) for c in (place // torch.tensor(size)).tolist()]
    changes = [i for i in range(1, len(brick)) if brick[i] != brick[i - 1]]
    runs = [brick[i] for i in [0, *changes]]
    assert runs == sorted(set(brick)), "each brick is one run, bricks in raster order"
    for start, stop in zip([0, *changes], [*changes, len(brick)], strict=True):
        inside = visual[start:stop].tolist()
        assert inside == sorted(inside)


def test_brick_of_one_frame():
    assert torch.equal(ORDERS.create("brick:8x16", (3, 16, 32)), ORDERS.create("brick:1x8x16", (3, 16, 32)))


@pytest.mark.parametrize("spec", ["brick:4", "brick:0x4x4", "brick:2x2x2x2", "brick:fullx4x4", "brick:size=3"])
def test_brick_size_errors(spec):
    with pytest.raises(ValueError, match="size of a brick must be"):
        order_index(spec, TokenGeometry((2, 3, 4)))


def test_morton_matches_interleaved_bits():
    grid = (3, 5, 6)

    def code(place):
        bits, out = [(size - 1).bit_length() for size in grid], ""
        for bit in range(max(bits)):
            for axis in (2, 1, 0):
                if bit < bits[axis]:
                    out = str(place[axis] >> bit & 1) + out
        return int(out, 2)

    codes = [code(place) for place in coordinates(ORDERS.create("morton", grid), grid).tolist()]
    assert codes == sorted(codes)


@pytest.mark.parametrize(
    "grid", [(30, 48, 80), (16, 16, 16), (1, 64, 64), (2, 6, 10), (4, 30, 52), (1, 63, 65)], ids=str
)
def test_gilbert_steps_to_neighbours(grid):
    assert (steps(ORDERS.create("gilbert", grid), grid).sum(1) == 1).all()


@pytest.mark.parametrize(("height", "width"), [(h, w) for h in range(1, 14) for w in range(1, 14)])
def test_gilbert_of_an_image_has_at_most_one_diagonal(height, width):
    step = steps(ORDERS.create("gilbert", (1, height, width)), (1, height, width))
    diagonal = int((step.sum(1) > 1).sum())
    parity_forbids = max(height, width) % 2 == 1 and min(height, width) % 2 == 0
    assert diagonal <= parity_forbids
    assert step.numel() == 0 or step.max() <= 1


@settings(deadline=None, max_examples=150)
@given(small_grids)
def test_gilbert_never_jumps(grid):
    step = steps(ORDERS.create("gilbert", grid), grid)
    assert step.numel() == 0 or step.max() <= 1
    if all(size % 2 == 0 for size in grid):
        assert (step.sum(1) == 1).all()


@pytest.mark.parametrize("grid", [(21, 45, 80), (13, 30, 45)], ids=str)
def test_curves_keep_blocks_compact(grid):
    def spread(name):
        place = coordinates(ORDERS.create(name, grid), grid)
        blocks = place[: len(place) // 64 * 64].view(-1, 64, 3)
        return float((blocks.amax(1) - blocks.amin(1) + 1).sum(1).float().mean())

    assert max(spread("gilbert"), spread("morton")) < 0.5 * spread("raster")
    rare = (steps(ORDERS.create("gilbert", grid), grid).sum(1) > 1).float().mean()
    assert rare < 0.02


@pytest.mark.parametrize("name", ["raster", "fhw", "brick:1x1x99", "brick:9x9x9"])
def test_natural_order_is_none(name):
    assert order_index(name, TokenGeometry((2, 3, 4), 5, 6)) is None


def test_swapping_an_axis_of_length_one_is_natural():
    assert order_index("hfw", TokenGeometry((1, 6, 4), 5)) is None


def test_flat_geometry_has_only_raster():
    flat = TokenGeometry.flat(10)
    assert order_index("raster", flat) is None
    with pytest.raises(ValueError, match=r"order 'hwf' needs a grid .* got the geometry 10 flat"):
        order_index("hwf", flat)
    with pytest.raises(ValueError, match="order must be one of"):
        order_index("nonsense", flat)


def test_unknown_order_suggests():
    with pytest.raises(ValueError, match="did you mean 'gilbert'"):
        order_index("hilbert", TokenGeometry((2, 3, 4)))


def test_cache_is_shared_bounded_and_clearable():
    clear_caches()
    geometry = TokenGeometry((2, 3, 4))
    assert order_index("hwf", geometry) is order_index("hwf", TokenGeometry((2, 3, 4)))
    for width in range(1, 200):
        order_index("wfh", TokenGeometry((2, 3, width)))
    info = orders._order_index.cache_info()
    assert info.currsize <= info.maxsize <= 64
    clear_caches()
    assert orders._order_index.cache_info().currsize == 0


def test_token_order_lays_out_all_heads_alike():
    geometry = TokenGeometry((2, 3, 4), 5, 1)
    order = token_order(AXIS_ORDERS, torch.tensor([2, 0, 5, 2]), geometry)
    assert isinstance(order, TokenOrder)
    assert order.table.dtype == order.head.dtype == torch.int32
    assert order.table.shape == (6, 30)
    assert order.head.tolist() == [2, 0, 5, 2]
    assert torch.equal(order.table[0], visual_first(geometry))
    assert (order.table[:, 24:] == torch.tensor([0, 1, 2, 3, 4, 29])).all()
    assert torch.equal(order.table[2], order_index("hwf", geometry))


def test_token_order_of_natural_orders_is_none():
    assert token_order(["raster", "fhw"], torch.tensor([0, 1]), TokenGeometry((2, 3, 4), 5)) is None


@pytest.mark.parametrize(
    ("names", "choice", "message"),
    [
        ([], torch.tensor([0]), "at least one"),
        (["hwf"], torch.tensor([[0]]), r"shape \(1, 1\)"),
        (["hwf"], torch.tensor([0.0]), "float32"),
        (["hwf"], torch.tensor([0, 1]), r"lie in 0\.\.0, got values from 0 to 1"),
    ],
)
def test_token_order_errors(names, choice, message):
    with pytest.raises(ValueError, match=message):
        token_order(names, choice, TokenGeometry((2, 3, 4)))


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 9), st.integers(0, 9), st.integers(1, 40), st.integers(1, 12), st.booleans())
def test_extra_blocks_match_the_tokens(prefix, suffix, width, block, natural):
    geometry = TokenGeometry((1, 1, width), prefix, suffix)
    index = torch.arange(geometry.tokens) if natural else visual_first(geometry)
    extra = [not prefix <= token < prefix + width for token in index.tolist()]
    wanted = [any(extra[start : start + block]) for start in range(0, len(extra), block)]
    assert extra_blocks(geometry, natural, block).tolist() == wanted


def test_extra_blocks_error():
    with pytest.raises(ValueError, match="got 0"):
        extra_blocks(TokenGeometry((1, 2, 3)), True, 0)


def test_inverse_of_a_table():
    table = torch.stack([order_index("hwf", TokenGeometry((2, 3, 4))), order_index("wfh", TokenGeometry((2, 3, 4)))])
    inverse = inverse_index(table)
    assert inverse.dtype == torch.int32
    assert (table.gather(1, inverse.long()) == torch.arange(24)).all()
