"""What every Triton launch of this package needs: the GPU's limits and key tiles through TMA where that works."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

__all__ = ["capability", "describe", "split_head_dim", "takes_tma"]


@lru_cache(maxsize=16)
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def capability(x: Tensor) -> int:
    """90 for Hopper; 0 on AMD GPUs and in the interpreter, where no NVIDIA generation applies."""
    if not x.is_cuda or torch.version.hip is not None:
        return 0
    major, minor = _capability(x.device.index or 0)
    return 10 * major + minor


def split_head_dim(dim: int) -> tuple[int, int]:
    """Two tile widths, powers of two, that cover a head size with less padding than one would.

    The second is 0 where one tile is exact, as for 64 and 128; 72 becomes 64 + 16 and 96 becomes 64 + 32.
    """
    if dim <= 16:
        return 16, 0
    first = 1 << (dim.bit_length() - 1)
    return first, 0 if first == dim else max(16, triton.next_power_of_2(dim - first))


def _strides(x: Tensor) -> list[int]:
    """Strides of ``[B, H, S]``; a dimension of size 1 is never stepped over and gets one that TMA accepts."""
    unit = 16 // x.element_size()
    return [step if size > 1 else unit for size, step in zip(x.shape[:3], x.stride()[:3], strict=True)]


def takes_tma(x: Tensor) -> bool:
    """Whether tiles of ``x`` can be loaded by Hopper's copy engine: aligned to 16 bytes, nothing broadcast."""
    if capability(x) < 90 or x.data_ptr() % 16:
        return False
    return all(step > 0 and step * x.element_size() % 16 == 0 for step in _strides(x))


def describe(x: Tensor, rows: int, width: int) -> Any:
    """A TMA descriptor of ``[1, 1, rows, width]`` tiles of ``x``; see :func:`takes_tma`.

    Args:
        x: ``[B, H, S, D]``, last dimension contiguous.
        rows: tokens of a tile.
        width: channels of a tile; those beyond ``D`` read as 0.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), [*_strides(x), 1], [1, 1, rows, width])
