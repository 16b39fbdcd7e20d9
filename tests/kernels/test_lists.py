from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel_kernels.lists import (
    levels_from_lists,
    lists_from_levels,
    pack_bits,
    unpack_bits,
    validate_levels,
)

masks = st.tuples(
    st.integers(1, 2), st.integers(1, 3), st.integers(1, 5), st.integers(1, 70), st.floats(0, 1), st.integers(0, 99)
)


def draw(batch: int, heads: int, qb: int, kb: int, density: float, seed: int) -> torch.Tensor:
    gen = torch.Generator().manual_seed(seed)
    pick = torch.rand(batch, heads, qb, kb, generator=gen) < density
    windowed = torch.rand(pick.shape, generator=gen) < 0.3
    return torch.where(windowed, 255, 1).mul(pick).to(torch.uint8)


@settings(deadline=None, max_examples=60)
@given(masks, st.booleans())
def test_lists_hold_the_mask(args: tuple[int, int, int, int, float, int], packed: bool) -> None:
    levels = draw(*args)
    capacity = max(1, int((levels != 0).sum())) if packed else None
    lists = lists_from_levels(levels, 64, 32, capacity=capacity)
    assert (lists.block_q, lists.block_k) == (64, 32)
    assert lists.partial is not None
    assert torch.equal(lists.full, (levels == 1).sum(-1, dtype=torch.int32))
    assert torch.equal(lists.partial, (levels == 255).sum(-1, dtype=torch.int32))
    for row in range(levels[..., 0].numel()):
        start, n, m = (int(x.flatten()[row]) for x in (lists.row_start, lists.full, lists.partial))
        wanted = levels.flatten(0, 2)[row]
        assert lists.indices[start : start + n].tolist() == (wanted == 1).nonzero().flatten().tolist()
        assert lists.indices[start + n : start + n + m].tolist() == (wanted == 255).nonzero().flatten().tolist()
    assert torch.equal(levels_from_lists(lists, levels.shape[-1]), levels)


@settings(deadline=None, max_examples=60)
@given(masks)
def test_bits_hold_the_mask(args: tuple[int, int, int, int, float, int]) -> None:
    levels = draw(*args)
    bits = pack_bits(levels)
    assert bits.dtype == torch.int32
    assert torch.equal(unpack_bits(bits, levels.shape[-1]), (levels != 0).to(torch.uint8))
    for block in (0, levels.shape[-1] - 1):
        word = bits[..., block // 32] >> (block % 32)
        assert torch.equal(word & 1, (levels[..., block] != 0).to(torch.int32))


def test_too_small_a_capacity_drops_blocks_and_stays_in_bounds() -> None:
    levels = torch.ones(1, 2, 3, 5, dtype=torch.uint8)
    lists = lists_from_levels(levels, 64, 64, capacity=12)
    assert lists.partial is not None
    assert lists.full.flatten().tolist() == [5, 5, 2, 0, 0, 0]
    assert int((lists.row_start + lists.full + lists.partial).max()) <= 12


def test_all_bits_of_a_word() -> None:
    assert pack_bits(torch.ones(1, 32, dtype=torch.uint8)).item() == -1


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(1, 1, 2, 2), "uint8"),
        (torch.zeros(2, 2, dtype=torch.uint8), "uint8"),
        (torch.full((1, 1, 1, 2), 3, dtype=torch.uint8), r"\[3\]"),
    ],
)
def test_validation_names_what_it_found(bad: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate_levels(bad)


def test_bad_sizes_raise() -> None:
    levels = torch.ones(1, 1, 1, 1, dtype=torch.uint8)
    validate_levels(levels)
    with pytest.raises(ValueError, match="block_q=0"):
        lists_from_levels(levels, 0, 64)
    with pytest.raises(ValueError, match="capacity must be positive, got 0"):
        lists_from_levels(levels, 64, 64, capacity=0)
    with pytest.raises(ValueError, match="2 words, got 1"):
        unpack_bits(torch.zeros(1, 1, 1, 1, dtype=torch.int32), 40)
