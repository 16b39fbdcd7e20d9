"""Tile shapes of the Triton kernel as data: no autotuning at the first call. Imports no triton."""

from __future__ import annotations

from dataclasses import dataclass

from .._common import split_head_dim

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


# (architecture, largest padded head size, bytes of an element): first match wins. sm_90 with 64 and 128 was measured on
# an H200; the others are chosen so that little spills and shared memory suffices (99 KiB on sm_89, 64 KiB on gfx942).
# float32 beyond 128 columns is there for correctness: 3xTF32 operands of that size spill whatever the tile.
_TABLE: tuple[tuple[str, int, int, TileConfig], ...] = (
    ("sm_90", 64, 2, TileConfig(64, 128, 4, 2, tma=True)),
    ("sm_90", 128, 2, TileConfig(128, 64, 4, 3, tma=True)),
    ("sm_90", 256, 2, TileConfig(64, 64, 4, 2, tma=True)),
    ("sm_90", 64, 4, TileConfig(64, 64, 4, 2)),
    ("sm_90", 128, 4, TileConfig(64, 32, 4, 2)),
    ("sm_90", 256, 4, TileConfig(32, 16, 4, 1)),
    ("sm_100", 128, 2, TileConfig(128, 64, 4, 3, tma=True)),
    ("sm_100", 256, 2, TileConfig(64, 64, 4, 2, tma=True)),
    ("sm_100", 128, 4, TileConfig(64, 32, 8, 1)),
    ("sm_100", 256, 4, TileConfig(32, 16, 4, 1)),
    ("sm_80", 64, 2, TileConfig(128, 64, 4, 3)),
    ("sm_80", 128, 2, TileConfig(128, 64, 8, 3)),
    ("sm_80", 256, 2, TileConfig(64, 32, 4, 2)),
    ("sm_80", 128, 4, TileConfig(32, 32, 4, 1)),
    ("sm_80", 256, 4, TileConfig(32, 16, 4, 1)),
    ("sm_89", 64, 2, TileConfig(128, 64, 4, 2)),
    ("sm_89", 128, 2, TileConfig(128, 64, 8, 2)),
    ("sm_89", 256, 2, TileConfig(64, 32, 4, 2)),
    ("sm_89", 128, 4, TileConfig(32, 32, 4, 1)),
    ("sm_89", 256, 4, TileConfig(32, 16, 4, 1)),
    ("hip", 128, 2, TileConfig(128, 64, 4, 1)),
    ("hip", 256, 2, TileConfig(64, 32, 4, 1)),
    ("hip", 256, 4, TileConfig(64, 32, 4, 1)),
)


def gather_tile(config: TileConfig) -> int:
    """Gathered keys of one step: each needs an address, and with more than 32 the tiles of 128 rows spill on sm_90."""
    return max(16, min(config.block_n, 32))


def tile_config(arch: str, head_dim: int, itemsize: int, block_q: int, block_k: int) -> TileConfig:
    """Choose the shape of a program.

    Args:
        arch: ``"hip"``, ``"interpreter"`` or ``"sm_<major><minor>"``.
        head_dim: columns of a head, up to 256.
        itemsize: bytes of an element, 2 or 4.
        block_q: tokens in a query block.
        block_k: tokens in a key block.

    Returns:
        A shape that fits the blocks.
    """
    if arch == "interpreter":
        return TileConfig(block_q, block_k, 4, 1)
    family = arch
    if arch.startswith("sm_"):
        number = int(arch[3:])
        # Consumer cards (86, 89, 120) have 99 KiB of shared memory a block.
        big = "sm_80" if number in (80, 87) else "sm_90" if number == 90 else "sm_100"
        family = big if number in (80, 87, 90) or 100 <= number < 120 else "sm_89"
    padded = sum(split_head_dim(head_dim))
    for name, limit, size, config in _TABLE:
        if name == family and padded <= limit and itemsize == size:
            return TileConfig(
                min(config.block_m, block_q),
                min(config.block_n, block_k),
                config.num_warps,
                config.num_stages,
                config.tma,
            )
    raise ValueError(f"no tile shape for {arch=}, {head_dim=}, {itemsize=}: head_dim must be at most 256")
