"""Which calls the Hopper kernel for short lists serves, and the configurations that stand for them. Imports no triton."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..aot_spec import AotSpec
from ..types import BlockLists
from .hopper_specs import HopperConfig, _spec

__all__ = ["is_short", "short_aot_specs"]


def is_short(lists: BlockLists, config: HopperConfig) -> bool:
    """Whether rows have at most ``config.short_tiles`` tiles of 128 keys, as far as the host knows their mean length."""
    rows = max(1, lists.row_start.numel())
    return lists.indices.numel() * lists.block_k <= config.short_tiles * 128 * rows


def short_aot_specs(kernel: Any) -> list[AotSpec]:
    """List the configurations of ``kernel`` that stand for all that users meet."""
    ragged = {"EVEN_K": False, "HAS_PARTIAL": True}
    cases: list[tuple[str, int, int, str, dict[str, Any]]] = [
        ("plain", 128, 128, "bf16", {}),
        ("plain", 64, 128, "bf16", {}),
        ("ragged", 128, 64, "bf16", ragged),
        ("ragged", 64, 64, "bf16", ragged),
    ]
    return [_short_spec(kernel, *case) for case in cases]


def _short_spec(kernel: Any, label: str, dim: int, block_k: int, dtype: str, flags: dict[str, Any]) -> AotSpec:
    spec = _spec(kernel, label, dim, block_k, dtype, {"CLAIM": True} | flags)
    values = {name: x for name, x in spec.constexprs.items() if name in spec.signature}
    name = spec.name.replace("block_sparse_hopper", "block_sparse_hopper_short", 1)
    return replace(spec, name=name, constexprs=values, max_spill_bytes=8)
