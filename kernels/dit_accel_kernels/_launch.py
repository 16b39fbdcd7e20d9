"""What every launch goes through, and needs: the GPU's limits, and key tiles through TMA where that works."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .recording import Recording

__all__ = ["capability", "describe", "here", "is_recording", "launch", "takes_tma"]


class _Thread(threading.local):
    """The recording that is under way in a thread."""

    recording: Recording | None = None


here = _Thread()


def is_recording() -> bool:
    """Whether this thread writes down its launches, see :mod:`.recording`."""
    return here.recording is not None


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
    """``kernel[grid]``, which a recording would not see: what carries out a plan starts all its kernels so."""
    recording = here.recording
    return kernel[grid] if recording is None else partial(recording.start, kernel, grid)


@lru_cache(maxsize=16)
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def capability(x: Tensor) -> int:
    """90 for Hopper; 0 on AMD GPUs and in the interpreter, where no NVIDIA generation applies."""
    if not x.is_cuda or torch.version.hip is not None:
        return 0
    major, minor = _capability(x.device.index or 0)
    return 10 * major + minor


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
