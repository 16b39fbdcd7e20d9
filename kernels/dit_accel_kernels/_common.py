"""Checks and choices that all small operators share. Imports no triton."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from ._launch import is_recording

__all__ = [
    "MAX_HEAD_DIM",
    "blocks",
    "check_bhsd",
    "eager",
    "next_power_of_2",
    "resolve_backend",
    "split_head_dim",
    "triton_reason",
]

MAX_HEAD_DIM = 256
# Constants, not cached functions: torch.compile traces through what uses them.
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def blocks(tokens: int, block: int) -> int:
    """Number of blocks of ``block`` tokens that cover ``tokens``, the last one possibly ragged."""
    return (tokens + block - 1) // block


def next_power_of_2(size: int) -> int:
    """The least power of two that is not below ``size``; triton's own takes the host 2 to 4 microseconds."""
    return 1 << (size - 1).bit_length()


def check_bhsd(name: str, x: Tensor) -> None:
    """Raise unless ``x`` is ``[B, H, S, D]`` with a contiguous last dimension."""
    if x.dim() != 4:
        raise ValueError(f"{name} must be [B, H, S, D], got shape {tuple(x.shape)}")
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(f"{name} must have a contiguous last dimension, got strides {x.stride()}")


def split_head_dim(head_dim: int) -> tuple[int, int]:
    """Split a head size into two powers of two that waste few columns.

    Args:
        head_dim: columns of a head.

    Returns:
        ``(first, second)``; ``second`` is 0 where one part serves as well. 96 gives (64, 32), 72 gives (64, 16).
    """
    first = 16
    while first * 2 <= head_dim:
        first *= 2
    if head_dim <= first:
        return first, 0
    second = 16
    while second < head_dim - first:
        second *= 2
    return (first, second) if second < first else (2 * first, 0)


def eager(op: Any, x: Tensor) -> Any:
    """The function behind a custom operator where nobody records the call, else the operator.

    The operator's own Python costs more than that of most of what stands in it. Under compile, dispatch modes and tensor
    subclasses it has to be seen.
    """
    if is_recording():
        return getattr(op, "_init_fn", op)
    recorded = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    return op if recorded or type(x) is not Tensor or x.is_meta or x.requires_grad else getattr(op, "_init_fn", op)


def triton_reason(x: Tensor) -> str | None:
    """Why the Triton kernels of this package cannot take ``x``, or ``None`` if they can."""
    if not _HAS_TRITON:
        return "triton is not installed"
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"expected a CUDA or ROCm tensor, got one on {x.device}"
    if x.dim() == 4 and (x.shape[-1] % 8 or x.shape[-1] > MAX_HEAD_DIM):
        return f"head_dim must be a multiple of 8 up to {MAX_HEAD_DIM}, got {x.shape[-1]}"
    if x.dtype.itemsize > 4 or not x.is_floating_point():
        return f"dtype must be bfloat16, float16 or float32, got {x.dtype}"
    return None


def resolve_backend(backend: str | None, x: Tensor) -> str:
    """The implementation to use: ``"triton"``, ``"cpu"`` (fast torch) or ``"reference"``.

    Args:
        backend: the user's wish, ``None`` for the fastest.
        x: the tensor whose device, dtype and head size decide.

    Raises:
        ValueError: an unknown name, or ``"triton"`` where it cannot run; the message says why.
    """
    if backend is None:
        return "cpu" if triton_reason(x) else "triton"
    if backend not in ("triton", "cpu", "reference"):
        raise ValueError(f"backend must be 'triton', 'cpu', 'reference' or None, got {backend!r}")
    if backend == "triton" and (reason := triton_reason(x)):
        raise ValueError(f"backend='triton' cannot run: {reason}")
    return backend
