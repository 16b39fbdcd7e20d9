"""Copies between layouts at the speed of memory."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["in_one_piece"]


def in_one_piece(x: Tensor) -> Tensor:
    """``x.contiguous()``, moving 16 bytes at a time where it can be.

    A copy between layouts is made element by element; 2 bytes at a time it reached a third of an H200's bandwidth.
    """
    if x.is_contiguous():
        return x
    each = 16 // x.element_size()
    offsets = (x.shape[-1], x.storage_offset(), *x.stride()[:-1])
    if x.stride(-1) != 1 or x.is_complex() or any(offset % each for offset in offsets):
        return x.contiguous()
    return x.view(torch.complex128).contiguous().view(x.dtype)
