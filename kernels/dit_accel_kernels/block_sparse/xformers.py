"""xFormers: an optional kernel for the dense step with its log-sum-exp, and why it is none for lists of blocks.

Its current release (0.0.35) has no attention over chosen blocks: ``BlockDiagonalMask`` and its kin let a query see one
range of keys, and the paged masks, which could name blocks, are served by a kernel for decoding (tiles of at most 32
queries, lengths on the host). Its memory-efficient attention yields the log-sum-exp for float32, for GPUs before Ampere and
for head sizes that torch's fused operators refuse; :func:`dit_accel_kernels.dense_attention` takes it there.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

__all__ = ["dense_xformers", "why_not_dense_xformers", "why_not_xformers"]


def why_not_xformers(**_: Any) -> str | None:
    """Say why xFormers cannot compute lists of blocks; it never can."""
    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed"
    return "xformers has no attention over lists of blocks; it serves dense steps (dense_attention) and lse_merge"


def why_not_dense_xformers(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Say why xFormers cannot compute a dense pass ``[B, H, S, D]`` with its log-sum-exp, or return ``None``."""
    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed"
    if not q.is_cuda:
        return f"device must be cuda, got {q.device}"
    try:
        from xformers.ops import fmha
    except Exception as error:  # built for another torch
        return f"xformers cannot be loaded: {type(error).__name__}: {error}"
    inputs = fmha.Inputs(*(x.transpose(1, 2) for x in (q, k, v)))
    reasons = fmha.cutlass.FwOp.not_supported_reasons(inputs)
    return "; ".join(reasons) or None


def dense_xformers(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention over all keys and its log-sum-exp.

    Args:
        q: ``[B, H, Sq, D]``.
        k: ``[B, H, Sk, D]``.
        v: ``[B, H, Sk, D]``.
        scale: factor of the logits.

    Returns:
        ``[B, H, Sq, D]``, a view of ``[B, Sq, H, D]``, and float32 ``[B, H, Sq]``.
    """
    from xformers.ops import fmha

    heads_last = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = fmha.memory_efficient_attention_partial(*heads_last, scale=scale, op=fmha.cutlass.FwOp)
    return out.transpose(1, 2), lse[:, :, : q.shape[2]].to(torch.float32)
