"""NATTEN's kernels (arXiv 2504.16922) for neighbourhood windows on a grid: optional, and none for lists of blocks.

A window comes to our kernels as lists of blocks and codes of tokens, in which text and other tokens may take part; NATTEN
takes the grid and the window instead. :func:`natten_windows` is that call, for grids without further tokens. Its
compiled library exists for two or three releases of torch only (https://whl.natten.org); without it NATTEN falls back to
FlexAttention or fails, which :func:`why_not_natten_windows` says beforehand.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["natten_windows", "why_not_natten", "why_not_natten_windows"]

_SEEN = "NATTEN takes a grid and a window, not lists of blocks; call natten_windows"


@lru_cache(maxsize=1)
def _load() -> tuple[Any, str | None]:
    """The module, or why it cannot be had."""
    if importlib.util.find_spec("natten") is None:
        return None, "natten is not installed"
    try:
        natten = importlib.import_module("natten")
    except Exception as error:  # wheels name one release of torch and do not load with another
        return None, f"natten cannot be loaded with torch {torch.__version__}: {type(error).__name__}: {error}"
    if not getattr(natten, "HAS_LIBNATTEN", False):
        return None, f"natten has no compiled library for torch {torch.__version__}; see https://whl.natten.org"
    return natten, None


def why_not_natten(**_: Any) -> str | None:
    """Say why NATTEN cannot compute lists of blocks; it never can."""
    return _load()[1] or _SEEN


def why_not_natten_windows(q: Tensor, grid: tuple[int, ...]) -> str | None:
    """Say why :func:`natten_windows` cannot compute ``q`` ``[B, H, S, D]`` on a grid, or return ``None``."""
    reason = _load()[1]
    if reason is not None:
        return reason
    if not q.is_cuda or torch.version.hip is not None:
        return f"device must be an NVIDIA GPU, got {q.device}"
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"dtype must be bfloat16, float16 or float32, got {q.dtype}"
    tokens = 1
    for length in grid:
        tokens *= length
    if not 1 <= len(grid) <= 3 or tokens != q.shape[2]:
        return f"the grid must have one to three axes and {q.shape[2]} tokens, got {grid}"
    return None


def natten_windows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: tuple[int, ...],
    window: tuple[int, ...],
    *,
    stride: tuple[int, ...] | None = None,
    dilation: tuple[int, ...] | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Neighbourhood attention on a grid by NATTEN.

    Args:
        q: ``[B, H, S, D]`` in raster order of the grid.
        k: like ``q``.
        v: like ``q``.
        grid: tokens on each axis.
        window: keys seen on each axis.
        stride: queries that share a window on each axis, 1 by default.
        dilation: distance of neighbouring keys on each axis, 1 by default.
        scale: factor of the logits, ``D ** -0.5`` by default.

    Returns:
        ``[B, H, S, D]`` and its log-sum-exp, float32 ``[B, H, S]``.

    Raises:
        ValueError: NATTEN is not there or cannot serve; the message says why.
    """
    reason = why_not_natten_windows(q, grid)
    if reason is not None:
        raise ValueError(f"natten cannot be used: {reason}")
    attend = importlib.import_module("natten.functional").neighborhood_attention_generic
    ones = (1,) * len(grid)
    tensors = (x.transpose(1, 2).unflatten(1, grid).contiguous() for x in (q, k, v))
    out, lse = attend(
        *tensors,
        kernel_size=window,
        stride=stride or ones,
        dilation=dilation or ones,
        is_causal=(False,) * len(grid),
        scale=q.shape[3] ** -0.5 if scale is None else scale,
        return_lse=True,
    )
    last = len(grid)
    return out.flatten(1, last).transpose(1, 2), lse.flatten(1, last).transpose(1, 2).to(torch.float32)
