"""Which tile shapes of the Triton kernel are worth a measurement. Imports no triton."""

from __future__ import annotations

from itertools import product

from .._common import split_head_dim
from ..block_sparse.configs import TileConfig

__all__ = ["candidates", "shared_bytes"]


def shared_bytes(config: TileConfig, head_dim: int, itemsize: int) -> int:
    """About what a program keeps in shared memory: its queries, and a ring of keys and values."""
    padded = sum(split_head_dim(head_dim))
    return (config.block_m + 2 * config.num_stages * config.block_n) * padded * itemsize


def candidates(
    head_dim: int, itemsize: int, block_q: int, block_k: int, *, shared_limit: int, tma: bool
) -> list[TileConfig]:
    """Shapes that fit the blocks and the shared memory, and whose accumulators do not spill at once.

    Args:
        head_dim: columns of a head.
        itemsize: bytes of an element.
        block_q: tokens in a query block.
        block_k: tokens in a key block.
        shared_limit: bytes of shared memory that one program may have.
        tma: whether the GPU has tensor descriptors, which then all of them use.

    Returns:
        Distinct shapes, small ones first.
    """
    found = []
    rows = [m for m in (32, 64, 128) if block_q % m == 0]
    keys = [n for n in (32, 64, 128) if block_k % n == 0]
    padded = sum(split_head_dim(head_dim))
    for block_m, block_n, warps, stages in product(rows, keys, (4, 8), (1, 2, 3, 4)):
        # Accumulator and logits in float32 beside at least 80 other registers of 255.
        if block_m * (padded + block_n) > 32 * warps * 176 or block_m < 8 * warps:
            continue
        config = TileConfig(block_m, block_n, warps, stages, tma)
        if shared_bytes(config, head_dim, itemsize) <= shared_limit:
            found.append(config)
    return found
