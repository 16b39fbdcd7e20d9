"""Windows found for a density, and windows snapped to tiles."""

import math
import random

import pytest

from dit_accel.geometry import TokenGeometry
from dit_accel.order import order_index
from dit_accel.windows import WindowSpec, snap, visible_fraction, window_for_density, window_levels


def keys_of(i, length, window, stride):
    """Key coordinates that query coordinate ``i`` sees: the window of its group's leader, shifted inwards."""
    leader = min(i - i % stride + stride // 2, length - 1)
    start = min(max(leader - window // 2, 0), length - window)
    return set(range(start, start + window))


@pytest.mark.parametrize("grid", [(21, 45, 80), (1, 64, 64), (30, 48, 80), (13, 30, 45)], ids=str)
@pytest.mark.parametrize("density", [0.05, 0.1, 0.2, 0.35, 0.5, 0.8, 1.0])
def test_window_for_density(grid, density):
    geometry = TokenGeometry(grid, prefix=50)
    window = window_for_density(geometry, density)
    for size, length in zip(window, grid, strict=True):
        assert size == length or size % 2 == 1
    if density == 1:
        assert window == grid
    assert abs(visible_fraction(geometry, WindowSpec(window)) - density) < 0.07 * max(density, 0.4)


@pytest.mark.parametrize("density", [0, -0.1, 1.5])
def test_window_for_density_errors(density):
    with pytest.raises(ValueError, match=f"got {density}"):
        window_for_density(TokenGeometry((2, 3, 4)), density)


def test_density_below_that_of_the_text():
    with pytest.raises(ValueError, match=r"at least 0\.091\d* for 1x64x64 \(\+200 text\).* got 0.05"):
        window_for_density(TokenGeometry((1, 64, 64), 200), 0.05)


class TestSnap:
    def test_hunyuan(self):
        spec = snap(TokenGeometry((30, 48, 80)), WindowSpec((18, 24, 24)), (2, 8, 8))
        assert (spec.window, spec.stride) == ((18, 24, 24), (2, 8, 8))
        published = WindowSpec((18, 24, 24), (16, 8, 8))
        assert snap(TokenGeometry((30, 48, 80)), published, (2, 8, 8)).stride == (16, 8, 8)

    @pytest.mark.parametrize("seed", range(25))
    def test_no_block_is_partial(self, seed):
        rng = random.Random(seed)
        tile = tuple(rng.choice([1, 2, 4]) for _ in range(3))
        grid = tuple(t * rng.randint(1, 4) for t in tile)
        geometry = TokenGeometry(grid)
        spec = snap(geometry, WindowSpec(tuple(rng.randint(1, n) for n in grid)), tile)
        tokens = math.prod(tile)
        index = order_index("brick:" + "x".join(map(str, tile)), geometry)
        assert not (window_levels(geometry, spec, index, tokens, tokens) == 255).any(), (grid, spec, tile)

    def test_nearest_by_exhaustion(self):
        def exact(length, window, stride, tile):
            seen = [keys_of(i, length, window, stride) for i in range(length)]
            tiles = [set(range(s, min(s + tile, length))) for s in range(0, length, tile)]
            for rows in tiles:
                for keys in tiles:
                    pairs = sum(len(seen[i] & keys) for i in rows)
                    if pairs not in (0, len(rows) * len(keys)):
                        return False
            return True

        for length, window, stride, tile in [
            (16, 7, 1, 4),
            (24, 9, 3, 4),
            (20, 6, 2, 2),
            (15, 7, 1, 4),
            (18, 11, 5, 3),
        ]:
            best = min(
                abs(w - window) + abs(s - stride)
                for w in range(1, length + 1)
                for s in range(1, w + 1)
                if (w == length and s == 1) or (w < length and exact(length, w, s, tile))
            )
            got = snap(TokenGeometry.flat(length), WindowSpec(window, stride), (1, 1, tile)).resolve(
                TokenGeometry.flat(length)
            )[2]
            assert abs(got.window - window) + abs(got.stride - stride) == best

    def test_ragged_axes_become_full(self):
        assert snap(TokenGeometry((21, 45, 80)), WindowSpec((9, 15, 24)), (2, 8, 8)).window == (-1, -1, 24)

    def test_query_tiles_of_their_own_size(self):
        spec = snap(TokenGeometry((30, 48, 80)), WindowSpec((18, 24, 24)), (2, 8, 8), tile_q=(4, 8, 8))
        assert spec.stride == (4, 8, 8)

    def test_errors(self):
        geometry = TokenGeometry((4, 8, 8))
        with pytest.raises(ValueError, match="width must be neither causal nor dilated"):
            snap(geometry, WindowSpec(4, causal=(False, False, True)), (1, 1, 4))
        with pytest.raises(ValueError, match="height must be neither causal nor dilated"):
            snap(geometry, WindowSpec(2, dilation=(1, 2, 1)), (1, 2, 2))
        with pytest.raises(ValueError, match="at least 1 token of frames, got 0 keys"):
            snap(geometry, WindowSpec(2), (0, 1, 1))

    def test_tiles_of_one_token_fit_everything(self):
        spec = WindowSpec((2, 3, 4), (1, 2, 3), (2, 2, 1), (True, False, False))
        assert snap(TokenGeometry((4, 8, 8)), spec, (1, 1, 1)) == spec
