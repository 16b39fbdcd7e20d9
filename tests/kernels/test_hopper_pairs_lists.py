"""Rows of pairs of query blocks: what both visit and what one does, as the kernel says it."""

from __future__ import annotations

import pytest
import torch

from dit_accel_kernels.block_sparse.hopper_pairs_launch import PairLists, pair_lists
from dit_accel_kernels.lists import lists_from_levels
from tests.kernels.interpreter import repair

pytestmark = pytest.mark.interpreter


def _tiles(pairs: PairLists, i: int, parts: int) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Blocks of the private tiles of both rows of pair ``i``, counted over all heads, and of the common ones."""
    begin, n, other, m, common = pairs.told.view(-1, 8)[i, :5].tolist()
    assert pairs.length.view(-1)[i].item() == max(n, m)
    ids = pairs.merged.tolist()
    blocks = (ids[begin : begin + n] + ids[other : other + m])[: n + m - common]
    counts = [max(-(-(size - common) // parts), 1) for size in (n, m)]
    gaps = [parts * count - (size - common) for count, size in zip(counts, (n, m), strict=True)]
    turns, shared = min(counts), common // parts
    order = [x % 2 for x in range(2 * turns)] + [2] * shared + [int(counts[1] > turns)] * (max(counts) - turns)
    found: tuple[list[list[int]], ...] = ([], [], [])
    for x, whose in enumerate(order):
        size = parts - (gaps[x] if x < 2 else 0)
        found[whose].append(blocks[:size])
        blocks = blocks[size:]
    assert not blocks
    return found[0], found[1], found[2]


@pytest.mark.parametrize("block_k", [64, 128])
@pytest.mark.parametrize("tokens", [640, 577])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("capacity", [None, 500])
def test_private_and_common_entries_are_those_of_the_lists(
    block_k: int, tokens: int, parts: int, capacity: int | None
) -> None:
    repair()
    gen = torch.Generator().manual_seed(tokens + block_k)
    qb, kb, units = 5, -(-tokens // block_k), -(-tokens // 64)
    draw = torch.rand(1, 6, qb, kb, generator=gen)
    # Alike, none, all, one of both without entries, disjoint, random.
    draw[:, 0] = draw[:, 0, :1]
    draw[:, 1], draw[:, 2], draw[:, 3, ::2] = 1.0, 0.0, 1.0
    board = torch.arange(kb) % 2
    draw[:, 4] = ((torch.arange(qb)[:, None] + board) % 2).float()
    levels = torch.where(draw < 0.4, torch.where(draw < 0.2, 1, 255), 0).to(torch.uint8)
    lists = lists_from_levels(levels, 64, block_k, capacity=capacity)
    pairs = pair_lists(lists, tokens, tile=64 * parts)
    assert pairs.told.shape == (1, 6, 3, 8)
    ratio = block_k // 64
    for i in range(18):
        head, first = i // 3, i % 3 * 2
        want = [
            {ratio * b + r for b in levels[0, head, row].nonzero().flatten().tolist() for r in range(ratio)}
            if row < qb
            else set()
            for row in (first, first + 1)
        ]
        want = [{b for b in row if b < units} for row in want]
        a, b, shared = _tiles(pairs, i, parts)
        common = [block for tile in shared for block in tile]
        for row, mine in zip(want, (a, b), strict=True):
            whole = [block for tile in mine for block in tile] + common
            assert sorted(whole) == sorted(row), "each entry once"
            assert mine[0] or not whole, "the first tile of a row is its own"
            if tokens % 64 and units - 1 in whole:
                assert mine[0][0] == units - 1, "the ragged block comes first"
        both = len(want[0] & want[1])
        assert len(common) >= min(both, *(len(row) for row in want)) - 4, "what both have is fetched once"
