"""The bound on derived index lists."""

from __future__ import annotations

import gc

import torch

from dit_accel.mask import BlockMask, ListCache


def _mask(seed: int) -> BlockMask:
    gen = torch.Generator().manual_seed(seed)
    levels = (torch.rand(1, 2, 10, 10, generator=gen) < 0.5).to(torch.uint8)
    levels[..., 0] = 1
    return BlockMask.from_levels(levels, 640, 640, 64, 64)


def _held(masks: list[BlockMask]) -> list[bool]:
    return [mask._lists is not None for mask in masks]


def test_what_does_not_fit_passes_through_and_comes_back_the_same() -> None:
    masks = [_mask(i) for i in range(8)]
    before = [mask.lists().indices.clone() for mask in masks]
    cache = ListCache(limit=4 * masks[0].nbytes() + 10)
    for mask, lists in 3 * list(zip(masks, before, strict=True)):
        cache.touch(mask)
        assert torch.equal(mask.lists().indices, lists)
    # The same three stay over all rounds, and one passes.
    assert _held(masks) == [True, True, True, False, False, False, False, True]


def test_several_that_pass_are_held_together_as_long_as_they_fit() -> None:
    masks = [_mask(i) for i in range(12)]
    cache = ListCache(limit=8 * masks[0].nbytes() + 10)
    for mask in (*masks, *masks[9:]):
        cache.touch(mask)
    assert _held(masks) == [True] * 6 + [False] * 4 + [True] * 2
    cache.touch(masks[10])
    cache.touch(masks[9])
    assert _held(masks) == [True] * 6 + [False] * 3 + [True] * 2 + [False]


def test_room_of_masks_that_are_gone_is_free_again() -> None:
    masks = [_mask(i) for i in range(4)]
    cache = ListCache(limit=4 * masks[0].nbytes() + 10)
    for mask in masks:
        cache.touch(mask)
    del masks, mask
    gc.collect()
    fresh = [_mask(i) for i in range(3)]
    for mask in (*fresh, _mask(9), _mask(10)):
        cache.touch(mask)
    assert _held(fresh) == [True] * 3


def test_one_mask_is_kept_whatever_its_size() -> None:
    cache = ListCache(limit=1)
    mask = _mask(0)
    cache.touch(mask)
    assert mask._lists is not None
