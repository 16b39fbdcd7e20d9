"""Logits of some query vectors against some vectors of each key block, reduced over the block."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["CHUNK_ELEMENTS", "block_logits"]

# Numbers that one chunk of rows may hold at a time: 64 MiB of float32.
CHUNK_ELEMENTS = 1 << 24


def block_logits(
    rows: Tensor, cols: Tensor, per_block: int, scale: float, seen: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    """Maximum and log-sum-exp of ``scale * rows @ cols.T`` over the vectors of each key block.

    On the GPU one Triton kernel keeps the logits on the chip. Elsewhere chunks of rows bound them to 64 MiB, or to one row
    of each head where that is more; ``cols`` is then also copied to float32.

    Args:
        rows: ``[B, H, R, E]`` contiguous.
        cols: ``[B, H, Kb * per_block, E]`` contiguous, ``per_block`` vectors for each key block.
        per_block: vectors of a key block.
        scale: positive factor of the products.
        seen: bool ``[B|1, H|1, Kb * per_block]``, false for vectors that count nothing; those must be finite.
        backend: ``"triton"``, or any other name for torch.

    Returns:
        Two float32 ``[B, H, R, Kb]``, natural logarithm, ``-inf`` where a block has no vector that counts.
    """
    # The kernel reduces tiles of a power of two of vectors; other counts are rare.
    use_triton = backend == "triton" and per_block & (per_block - 1) == 0 and per_block <= 128
    return _block_logits_op(rows, cols, per_block, scale, seen, use_triton)


@torch.library.custom_op("dit_accel_kernels::block_logits", mutates_args=())
def _block_logits_op(
    rows: Tensor, cols: Tensor, per_block: int, scale: float, seen: Tensor | None, use_triton: bool
) -> tuple[Tensor, Tensor]:
    if use_triton:
        from .triton import block_logits_triton

        return block_logits_triton(rows, cols, per_block, scale, seen)
    batch, heads, count, _ = rows.shape
    blocks = cols.shape[2] // per_block
    top = rows.new_empty((batch, heads, count, blocks), dtype=torch.float32)
    lse = torch.empty_like(top)
    wide = cols.float().mT
    step = max(1, CHUNK_ELEMENTS // max(1, batch * heads * cols.shape[2]))
    for first in range(0, count, step):
        part = slice(first, first + step)
        logits = (rows[:, :, part].float() @ wide).mul_(scale)
        if seen is not None:
            logits.masked_fill_(~seen[:, :, None], -torch.inf)
        cells = logits.unflatten(-1, (blocks, per_block))
        top[:, :, part] = cells.amax(-1)
        lse[:, :, part] = cells.logsumexp(-1)
    return top, lse


@_block_logits_op.register_fake
def _(
    rows: Tensor, cols: Tensor, per_block: int, scale: float, seen: Tensor | None, use_triton: bool
) -> tuple[Tensor, Tensor]:
    shape = (*rows.shape[:3], cols.shape[2] // per_block)
    return rows.new_empty(shape, dtype=torch.float32), rows.new_empty(shape, dtype=torch.float32)
