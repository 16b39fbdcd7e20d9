"""Windows against a brute-force oracle written from NATTEN's definition, one query and one axis at a time."""

import math
import random
import time

import pytest
import torch

from dit_accel.geometry import TokenGeometry
from dit_accel.order import order_index
from dit_accel.windows import (
    AxisWindow,
    WindowSpec,
    axis_codes,
    token_windows,
    visible_fraction,
    window_levels,
)


@pytest.fixture(autouse=True)
def _one_thread():
    """Small operators on a busy machine wait for each other's threads far longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def oracle_axis(i, length, window, stride, dilation, causal):
    """Key coordinates that query coordinate ``i`` sees."""
    members = [j for j in range(length) if j % dilation == i % dilation]
    place = members.index(i)
    first_of_group = place - place % stride
    if causal:
        last_of_group = min(first_of_group + stride - 1, len(members) - 1)
        return {members[p] for p in range(len(members)) if last_of_group - window < p <= place}
    leader = min(first_of_group + stride // 2, len(members) - 1)
    start = leader - window // 2
    while start + window > len(members):
        start -= 1
    while start < 0:
        start += 1
    return {members[p] for p in range(start, start + window)}


def oracle(geometry, rules, index):
    """Dense bool mask in block order; ``rules`` holds (window, stride, dilation, causal) per axis of the grid."""
    grid = geometry.axes
    seen = [[oracle_axis(i, n, *rule) for i in range(n)] for n, rule in zip(grid, rules, strict=True)]
    place = {}
    for token in range(geometry.tokens):
        visual = token - geometry.prefix
        if 0 <= visual < geometry.visual:
            place[token] = (visual // (grid[1] * grid[2]), visual // grid[2] % grid[1], visual % grid[2])
    order = list(range(geometry.tokens)) if index is None else index.tolist()
    mask = torch.ones(len(order), len(order), dtype=torch.bool)
    for row, query in enumerate(order):
        if query not in place:
            continue
        sets = [seen[a][place[query][a]] for a in range(3)]
        mask[row] = torch.tensor(
            [key not in place or all(place[key][a] in sets[a] for a in range(3)) for key in order], dtype=torch.bool
        )
    return mask


def materialise(windows):
    code, lo, hi = windows.k_code, windows.q_lo, windows.q_hi
    inside = (lo[:, :, None] <= code[:, None, :]) & (code[:, None, :] < hi[:, :, None])
    return inside.all(0) | (code[0] < 0)


def block_levels(mask, block_q, block_k):
    rows, columns = mask.shape
    out = torch.empty(-(-rows // block_q), -(-columns // block_k), dtype=torch.uint8)
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            part = mask[i * block_q : (i + 1) * block_q, j * block_k : (j + 1) * block_k]
            out[i, j] = 1 if part.all() else 255 if part.any() else 0
    return out


def random_rule(rng, length):
    if length == 1 or rng.random() < 0.15:
        return (length, 1, 1, rng.random() < 0.2)
    window = rng.randint(1 if rng.random() < 0.1 else 2, length)
    stride = rng.choice([1, rng.randint(1, window)])
    dilation = rng.choice([1, rng.randint(1, length // window)])
    if window == length:
        stride = dilation = 1
    return (window, stride, dilation, rng.random() < 0.25)


def random_case(seed):
    rng = random.Random(seed)
    dims = rng.randint(1, 3)
    top = {1: 90, 2: 12, 3: 6}[dims]
    grid = (1,) * (3 - dims) + tuple(rng.randint(1, top) for _ in range(dims))
    prefix, suffix = rng.choice([(0, 0), (0, 0), (5, 0), (0, 7), (3, 4), (16, 0)])
    rules = [(n, 1, 1, False) for n in grid[: 3 - dims]] + [random_rule(rng, n) for n in grid[3 - dims :]]
    given = rules[3 - dims :]
    spec = WindowSpec(*(tuple(rule[k] for rule in given) for k in range(4)))
    flat = dims == 1 and rng.random() < 0.5
    geometry = TokenGeometry.flat(grid[2], prefix, suffix) if flat else TokenGeometry(grid, prefix, suffix)
    name = "raster" if flat else rng.choice(["raster", "brick:2x4x4", "brick:3x2x5", "gilbert", "wfh"])
    blocks = rng.choice([4, 7, 8, 16]), rng.choice([4, 5, 8, 16])
    return geometry, rules, spec, order_index(name, geometry), blocks


@pytest.mark.parametrize("chunk", range(20))
def test_random_cases_equal_the_oracle(chunk):
    for seed in range(chunk * 25, chunk * 25 + 25):
        geometry, rules, spec, index, (block_q, block_k) = random_case(seed)
        mask = oracle(geometry, rules, index)
        case = f"seed {seed}: {geometry}, {spec}"
        assert torch.equal(materialise(token_windows(geometry, spec, index)), mask), case
        levels = window_levels(geometry, spec, index, block_q, block_k)
        assert levels.dtype == torch.uint8
        assert torch.equal(levels[0, 0], block_levels(mask, block_q, block_k)), f"{case}, {block_q}x{block_k}"
        assert visible_fraction(geometry, spec) == pytest.approx(float(mask.double().mean()), abs=1e-12), case


@pytest.mark.parametrize("causal", [False, True])
def test_axis_rule_exhaustively(causal):
    for length in range(1, 15):
        for window in range(1, length + 1):
            for stride in range(1, window + 1):
                for dilation in range(1, length // window + 1):
                    code, lo, hi = axis_codes(AxisWindow(length, window, stride, dilation, causal))
                    assert len(set(code.tolist())) == length
                    for i in range(length):
                        got = {j for j in range(length) if lo[i] <= code[j] < hi[i]}
                        assert got == oracle_axis(i, length, window, stride, dilation, causal)
                        assert i in got or not (causal or stride == 1), "the query itself is seen"
                        assert causal or len(got) == window


def test_extra_tokens_see_all_and_are_seen():
    geometry = TokenGeometry((2, 4, 4), 3, 2)
    windows = token_windows(geometry, WindowSpec(2), order_index("brick:2x2x2", geometry))
    assert (windows.k_code[:, 32:] == -1).all()
    assert (windows.q_lo[:, 32:] == -(2**30)).all()
    assert (windows.q_hi[:, 32:] == 2**30).all()
    assert windows.q_lo.dtype == windows.q_hi.dtype == windows.k_code.dtype == torch.int32
    assert (windows.k_code[:, :32] >= 0).all()


def simulate(grid, window, stride, brick):
    geometry = TokenGeometry(grid)
    spec = WindowSpec(window, stride)
    index = order_index("brick:" + "x".join(map(str, brick)), geometry)
    tokens = math.prod(brick)
    levels = window_levels(geometry, spec, index, tokens, tokens)
    visited = int((levels > 0).sum())
    return 1 / visible_fraction(geometry, spec), levels.numel() / visited, int((levels == 1).sum()) / visited


@pytest.mark.parametrize(
    ("grid", "window", "stride", "brick", "flop_bound", "tile_bound", "full"),
    [
        ((30, 48, 80), (18, 24, 24), 1, (2, 8, 8), 11.11, 5.44, 0.17),
        ((30, 48, 80), (18, 24, 24), (16, 8, 8), (2, 8, 8), 11.11, 11.11, 1),
        ((1, 256, 256), 80, 1, (1, 16, 8), 10.24, 7.51, 0.495),
        ((1, 256, 256), 80, 16, (1, 16, 8), 10.24, 10.24, 1),
        ((24, 44, 80), (24, 12, 24), (1, 4, 8), (4, 4, 8), 12.22, 12.22, 1),
        ((24, 44, 80), (24, 20, 40), (1, 4, 8), (4, 4, 8), 4.40, 4.40, 1),
        ((24, 44, 80), (24, 28, 56), (1, 4, 8), (4, 4, 8), 2.24, 2.24, 1),
    ],
)
def test_published_shapes(grid, window, stride, brick, flop_bound, tile_bound, full):
    got = simulate(grid, window, stride, brick)
    assert got == pytest.approx((flop_bound, tile_bound, full), abs=0.006)


def test_large_grid_is_quick():
    geometry = TokenGeometry((30, 48, 80), suffix=256)
    start = time.process_time()
    levels = window_levels(geometry, WindowSpec((18, 24, 24)), order_index("gilbert", geometry), 128, 128)
    assert time.process_time() - start < 10  # about half a second
    assert levels.shape == (1, 1, 902, 902)
    assert (levels[..., 900:, :] == 1).all()
    assert (levels[..., 900:] == 1).all()


class TestSpec:
    def test_fewer_values_concern_the_last_axes(self):
        axes = WindowSpec((4, 6), (2, 3)).resolve(TokenGeometry((5, 8, 9)))
        assert axes == (AxisWindow(5, 5), AxisWindow(8, 4, 2), AxisWindow(9, 6, 3))

    def test_scalars_concern_all_axes_and_images_have_full_frames(self):
        axes = WindowSpec(4, 2, causal=True).resolve(TokenGeometry((1, 8, 9)))
        assert axes == (AxisWindow(1, 1, causal=True), AxisWindow(8, 4, 2, 1, True), AxisWindow(9, 4, 2, 1, True))

    @pytest.mark.parametrize("whole", [-1, "full", 8, 100])
    def test_ways_to_say_the_whole_axis(self, whole):
        geometry = TokenGeometry((1, 8, 8), 3)
        axes = WindowSpec((whole, 4), (3, 1) if whole != 4 else 1, (2, 2)).resolve(geometry)
        assert axes[1:] == (AxisWindow(8, 8), AxisWindow(8, 4, 1, 2))
        assert visible_fraction(geometry, WindowSpec(whole)) == 1
        assert (window_levels(geometry, WindowSpec(whole), None, 16, 16) == 1).all()

    def test_a_scalar_dilation_is_lowered_where_it_does_not_fit(self):
        axes = WindowSpec(4, dilation=3).resolve(TokenGeometry((5, 8, 12)))
        assert [axis.dilation for axis in axes] == [1, 2, 3]

    def test_flat_geometry_is_one_axis(self):
        assert WindowSpec(64, 16).resolve(TokenGeometry.flat(1000))[2] == AxisWindow(1000, 64, 16)

    def test_hashable(self):
        assert hash(WindowSpec((4, 4))) == hash(WindowSpec((4, 4)))

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"window": 0}, "window must be at least 1 token.*got 0"),
            ({"window": -2}, "got -2"),
            ({"window": "ful"}, "got 'ful'"),
            ({"window": 2.5}, "got 2.5"),
            ({"window": 4, "stride": 0}, "stride must be an integer of at least 1, got 0"),
            ({"window": 4, "dilation": 0}, "dilation must be an integer of at least 1, got 0"),
            ({"window": 4, "stride": 5}, "stride must be at most the window, 4, got 5"),
            ({"window": (4, 8), "stride": (4, 9)}, "at most the window, 8, got 9"),
            ({"window": (4, 8), "stride": (4, 4, 4)}, "one length from 1 to 3"),
            ({"window": (4, 4, 4, 4)}, "one length from 1 to 3"),
            ({"window": 4, "causal": 1}, "causal must be a bool"),
        ],
    )
    def test_errors(self, values, message):
        with pytest.raises(ValueError, match=message):
            WindowSpec(**values)

    def test_dilated_window_longer_than_the_axis(self):
        with pytest.raises(ValueError, match=r"at most 8, the height of the grid, got 3 \* 3"):
            WindowSpec((3, 3), dilation=(3, 1)).resolve(TokenGeometry((1, 8, 8)))

    @pytest.mark.parametrize("index", [torch.arange(5), torch.zeros(2, 18, dtype=torch.int64), torch.zeros(18)])
    def test_wrong_index(self, index):
        geometry = TokenGeometry((2, 3, 3))
        with pytest.raises(ValueError, match=r"index must be integers \[18\]"):
            token_windows(geometry, WindowSpec(2), index)
        with pytest.raises(ValueError, match=r"index must be integers \[18\]"):
            window_levels(geometry, WindowSpec(2), index, 4, 4)

    def test_wrong_block(self):
        with pytest.raises(ValueError, match="got 0 and 4"):
            window_levels(TokenGeometry((2, 3, 3)), WindowSpec(2), None, 0, 4)
