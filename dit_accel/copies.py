"""Copies between layouts at the speed of memory."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["copy_wide_", "in_one_piece"]


def in_one_piece(x: Tensor) -> Tensor:
    """``x.contiguous()``, moving 16 bytes at a time where it can be.

    A copy between layouts is made element by element; 2 bytes at a time it reached a third of an H200's bandwidth.
    """
    if x.is_contiguous():
        return x
    wide = _wide(x)
    return x.contiguous() if wide is None else wide.contiguous().view(x.dtype)


def copy_wide_(into: Tensor, x: Tensor) -> None:
    """``into.copy_(x)`` for tensors of the same shape and dtype, moving 16 bytes at a time where it can be."""
    there, here = _wide(into), _wide(x)
    if there is None or here is None:
        into.copy_(x)
    else:
        there.copy_(here)


def _wide(x: Tensor) -> Tensor | None:
    """A view in elements of 16 bytes, if there is one."""
    each = 16 // x.element_size()
    offsets = (x.shape[-1], x.storage_offset(), *x.stride()[:-1])
    if x.stride(-1) != 1 or x.is_complex() or any(offset % each for offset in offsets):
        return None
    return x.view(torch.complex128)
