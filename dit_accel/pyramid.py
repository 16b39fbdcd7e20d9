"""From levels of a mask to the pooled keys that a plan gathers (Pyramid Sparse Attention, arXiv 2512.04025)."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.score import Gather
from dit_accel_kernels import pyramid
from dit_accel_kernels.pyramid import pyramid_rows
from dit_accel_kernels.types import GatheredKeys

__all__ = ["LEVELS", "pyramid_gather"]

#: Tokens that one key of each pooled level stands for.
LEVELS = (2, 4, 8)


def pyramid_gather(levels: Tensor, block_k: int) -> Gather:
    """The pooled blocks of a plan.

    Args:
        levels: uint8 ``[B, H, Qb, Kb]``; 2, 4 and 8 enter the softmax as means of so many tokens, with ``+log(count)``.
        block_k: tokens in a key block.

    Returns:
        What pools the keys and values of each sparse call and gathers the chosen groups.
    """
    share = torch.zeros(levels.shape[:2], device=levels.device)
    for level in LEVELS:
        share = share + (levels == level).float().mean((2, 3)) / level

    def keys(key: Tensor, value: Tensor, key_valid: Tensor | None) -> GatheredKeys:
        made = pyramid(key, value, levels=LEVELS, block=block_k, key_valid=key_valid)
        # From the map each time: rows take 16 times its memory, which every layer's plan would keep.
        return GatheredKeys(made.k, made.v, made.bias, *pyramid_rows(levels, levels=LEVELS), made.group)

    return Gather(keys, share)
