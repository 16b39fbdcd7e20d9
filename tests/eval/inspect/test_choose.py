"""Which layers, heads, steps and tokens are looked at."""

from __future__ import annotations

import pytest

from dit_accel.geometry import TokenGeometry
from dit_accel_eval.inspect.choose import evenly, lattice, pick, pick_tokens


def test_evenly_takes_first_and_last() -> None:
    assert evenly(10, 4) == (0, 3, 6, 9)
    assert evenly(2, 4) == (0, 1)
    assert evenly(1, 3) == (0,)


def test_pick_counts_negative_indices_from_the_end() -> None:
    assert pick("layers", [-1, 0, 5], 6, 4) == (0, 5)
    assert pick("layers", None, 6, 2) == (0, 5)
    for bad in ([6], [-7], [], [True], [1.0]):
        with pytest.raises(ValueError, match="layers must be indices from -6 to 5"):
            pick("layers", bad, 6, 4)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [1, 2, 8, 60, 64, 10**6])
@pytest.mark.parametrize(
    "geometry", [TokenGeometry((5, 8, 8), 3, 2), TokenGeometry((1, 30, 50)), TokenGeometry.flat(77, 4)]
)
def test_the_lattice_spreads_over_the_grid(geometry: TokenGeometry, count: int) -> None:
    found = lattice(geometry, count)
    assert len(found) == len(set(found))
    assert len(found) <= count
    assert len(found) >= min(count, geometry.visual) // 2
    assert all(geometry.prefix <= t < geometry.prefix + geometry.visual for t in found)
    if count >= geometry.visual:
        assert len(found) == geometry.visual


def test_tokens_can_be_named() -> None:
    geometry = TokenGeometry((2, 3, 4), 5, 1)
    assert pick_tokens([0, -1, 7], geometry) == (0, 7, 29)
    with pytest.raises(ValueError, match="tokens must be indices from -30 to 29"):
        pick_tokens([30], geometry)
    with pytest.raises(ValueError, match="at least 1 or a list of tokens, got 0"):
        pick_tokens(0, geometry)
