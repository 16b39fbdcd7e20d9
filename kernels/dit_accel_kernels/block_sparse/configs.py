"""Tile shapes of the Triton kernel from tables: no autotuning at the first call. Imports no triton.

The shipped table is ``tune/tiles.json``: sm_90 with head sizes of 64 and 128 was measured on an H200, the others are chosen
so that little spills and shared memory suffices (99 KiB on sm_89, 64 KiB on gfx942). float32 beyond 128 columns is there
for correctness: 3xTF32 operands of that size spill whatever the tile. ``dit-accel tune`` measures better ones for a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from .._common import split_head_dim
from ..tune.store import TileEntry, measured_tiles, shipped_tiles

__all__ = ["TileConfig", "gather_tile", "tile_config"]


@dataclass(frozen=True)
class TileConfig:
    """How one program is shaped.

    Attributes:
        block_m: query rows of a program, at most the query block.
        block_n: keys of one step, at most the key block.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline.
        tma: whether K and V come through tensor descriptors where strides and addresses allow.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool = False


def gather_tile(config: TileConfig) -> int:
    """Gathered keys of one step: each needs an address, and with more than 32 the tiles of 128 rows spill on sm_90."""
    return max(16, min(config.block_n, 32))


def tile_config(
    arch: str, head_dim: int, itemsize: int, block_q: int, block_k: int, *, gpu: tuple[str, str] | None = None
) -> TileConfig:
    """Choose the shape of a program.

    Args:
        arch: ``"hip"``, ``"interpreter"`` or ``"sm_<major><minor>"``.
        head_dim: columns of a head, up to 256.
        itemsize: bytes of an element, 2 or 4.
        block_q: tokens in a query block.
        block_k: tokens in a key block.
        gpu: name of the GPU and version of Triton, to look for what was measured there; ``None`` for the shipped table.

    Returns:
        A shape that fits the blocks.

    Raises:
        ValueError: no entry of the table is for this head size.
    """
    if arch == "interpreter":
        return TileConfig(block_q, block_k, 4, 1)
    if gpu is not None:
        found = measured_tiles(*gpu).get((head_dim, itemsize, block_q, block_k))
        if found is not None and block_q % found.block_m == 0 and block_k % found.block_n == 0:
            return _shape(found, block_q, block_k)
    family, padded = _family(arch), sum(split_head_dim(head_dim))
    for entry in shipped_tiles():
        if entry.arch == family and padded <= entry.head_dim and itemsize == entry.itemsize:
            return _shape(entry, block_q, block_k)
    raise ValueError(f"no tile shape for {arch=}, {head_dim=}, {itemsize=}: head_dim must be at most 256")


def _family(arch: str) -> str:
    """The architecture whose entries serve for another."""
    if not arch.startswith("sm_"):
        return arch
    number = int(arch[3:])
    # Consumer cards (86, 89, 120) have 99 KiB of shared memory a block.
    big = "sm_80" if number in (80, 87) else "sm_90" if number == 90 else "sm_100"
    return big if number in (80, 87, 90) or 100 <= number < 120 else "sm_89"


def _shape(entry: TileEntry, block_q: int, block_k: int) -> TileConfig:
    rows, keys = min(entry.block_m, block_q), min(entry.block_n, block_k)
    return TileConfig(rows, keys, entry.num_warps, entry.num_stages, entry.tma)
