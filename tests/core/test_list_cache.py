"""The bound on derived index lists."""

from __future__ import annotations

import torch

from dit_accel.mask import BlockMask, ListCache


def _mask(seed: int) -> BlockMask:
    gen = torch.Generator().manual_seed(seed)
    levels = (torch.rand(1, 2, 10, 10, generator=gen) < 0.5).to(torch.uint8)
    levels[..., 0] = 1
    return BlockMask.from_levels(levels, 640, 640, 64, 64)


def test_least_recently_used_lists_are_dropped_and_come_back_the_same() -> None:
    masks = [_mask(i) for i in range(4)]
    before = masks[0].lists().indices.clone()
    cache = ListCache(limit=2 * masks[0].nbytes() + 10)
    for mask in masks:
        cache.touch(mask)
    assert [mask._lists is not None for mask in masks] == [False, False, True, True]
    cache.touch(masks[0])
    assert torch.equal(masks[0].lists().indices, before)
    assert [mask._lists is not None for mask in masks] == [True, False, False, True]


def test_one_mask_is_kept_whatever_its_size() -> None:
    cache = ListCache(limit=1)
    mask = _mask(0)
    cache.touch(mask)
    assert mask._lists is not None
