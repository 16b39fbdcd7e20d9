"""Tile shapes of the 8-bit Triton kernel as data. Imports no triton."""

from __future__ import annotations

from ..block_sparse.configs import TileConfig

__all__ = ["family", "pooled_tile", "tile_config"]

# (architecture, widest code, kind of values): first match wins; "" matches every kind. sm_90 with 128 was measured on an
# H200 (docs/quantized_notes.md); the others are chosen so that little spills and shared memory suffices.
_TABLE: tuple[tuple[str, int, str, TileConfig], ...] = (
    ("sm_90", 128, "", TileConfig(64, 128, 4, 3, tma=True)),
    ("sm_90", 256, "", TileConfig(64, 32, 8, 2, tma=True)),
    ("sm_100", 128, "", TileConfig(128, 64, 8, 3, tma=True)),
    ("sm_100", 256, "", TileConfig(64, 64, 8, 2, tma=True)),
    ("sm_80", 128, "", TileConfig(128, 64, 8, 3)),
    ("sm_80", 256, "", TileConfig(64, 32, 8, 2)),
    ("sm_89", 128, "", TileConfig(128, 64, 8, 2)),
    ("sm_89", 256, "", TileConfig(64, 32, 8, 2)),
    ("hip", 128, "", TileConfig(128, 64, 4, 1)),
    ("hip", 256, "", TileConfig(64, 32, 4, 1)),
)


def family(arch: str) -> str:
    """The row of the table that stands for an architecture: consumer cards (86, 89, 120) have 99 KiB a block."""
    if not arch.startswith("sm_"):
        return arch
    number = int(arch[3:])
    if number in (80, 87):
        return "sm_80"
    return "sm_90" if number == 90 else "sm_100" if 100 <= number < 120 else "sm_89"


def pooled_tile(config: TileConfig) -> int:
    """Pooled keys of one step: they are 16-bit, and as many as exact ones would take the memory of a second program."""
    return min(config.block_n, 64)


def tile_config(arch: str, width: int, pv: str, block_q: int, block_k: int) -> TileConfig:
    """Choose the shape of a program.

    Args:
        arch: ``"hip"``, ``"interpreter"`` or ``"sm_<major><minor>"``.
        width: columns of a code: 64, 128 or 256.
        pv: number format of the values: ``"bf16"``, ``"fp8"`` or ``"int8"``.
        block_q: tokens in a query block.
        block_k: tokens in a key block.

    Returns:
        A shape that fits the blocks.
    """
    if arch == "interpreter":
        return TileConfig(block_q, min(block_k, 128), 4, 1)
    for name, limit, kind, c in _TABLE:
        if name == family(arch) and width <= limit and kind in ("", pv):
            return TileConfig(min(c.block_m, block_q), min(c.block_n, block_k), c.num_warps, c.num_stages, c.tma)
    raise ValueError(f"no tile shape for {arch=}, {width=}")
