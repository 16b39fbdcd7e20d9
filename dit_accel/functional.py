"""Block-sparse attention with a mask of the user's own (FlashAttention's block mask, arXiv 2205.14135)."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.mask import BlockMask
from dit_accel.pyramid import pyramid_gather
from dit_accel_kernels import block_sparse_attention as _kernel

__all__ = ["block_sparse_attention"]


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | BlockMask,
    *,
    block: int | tuple[int, int] = 64,
    scale: float | None = None,
    key_valid: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in which each block of queries sees the key blocks of its row of ``mask``, and nothing else.

    Blocks that are skipped are not read. Forward only. Nothing here waits for the device; a mask that is used again should
    be made once, as a :class:`~dit_accel.mask.BlockMask`, which keeps its index lists.

    Args:
        q: ``[B, H, Sq, D]`` bf16, fp16 or fp32; any strides, last dimension contiguous.
        k: ``[B, H, Sk, D]``; ``Sk`` may differ from ``Sq``.
        v: like ``k``.
        mask: bool ``[B|1, H|1, Qb, Kb]`` with ``Qb = ceil(Sq / block_q)`` and ``Kb = ceil(Sk / block_k)``; or uint8 levels
            of that shape: 0 skips, 1 is exact, 2, 4 and 8 let the block in as means of so many tokens. Or a ``BlockMask``.
        block: tokens in a block, one number or ``(block_q, block_k)``: 16, 32, 64 or 128. A ``BlockMask`` knows its own.
        scale: factor of the logits, ``D ** -0.5`` by default.
        key_valid: bool ``[B, Sk]``, false for padding.
        return_lse: also return the log-sum-exp of the scaled logits, natural logarithm.
        backend: kernel backend, or ``None`` for the best that passes its self-test.

    Returns:
        ``[B, H, Sq, D]`` like ``q``; with ``return_lse`` also float32 ``[B, H, Sq]``. A query that sees no key gives 0 and
        a log-sum-exp of minus infinity.

    Raises:
        ValueError: shapes, dtypes, block sizes or the backend do not fit.
        RuntimeError: if the requested backend failed its self-test.
    """
    gathered = None
    if not isinstance(mask, BlockMask):
        block_q, block_k = (block, block) if isinstance(block, int) else block
        if mask.dtype not in (torch.bool, torch.uint8):
            raise ValueError(f"mask must be bool or uint8 levels, got {mask.dtype}")
        levels = mask.to(torch.uint8)
        if mask.dtype == torch.uint8:
            gathered = pyramid_gather(levels, block_k).keys(k, v, key_valid)
        exact = (levels == 1).to(torch.uint8)
        mask = BlockMask.from_levels(exact, q.shape[2], k.shape[2], block_q, block_k)
    elif (mask.q_len, mask.k_len) != (q.shape[2], k.shape[2]):
        raise ValueError(f"mask is for {mask.q_len} x {mask.k_len} tokens, got {q.shape[2]} x {k.shape[2]}")
    return _kernel(
        q,
        k,
        v,
        mask.lists(),
        scale=scale,
        gathered=gathered,
        key_valid=key_valid,
        return_lse=return_lse,
        backend=backend,
    )
