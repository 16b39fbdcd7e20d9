"""Configurations of the quantiser's kernels that are compiled ahead of time. Imports no triton."""

from __future__ import annotations

from typing import Any

from ..aot_spec import ALL_TARGETS, AotSpec
from .types import LIMITS

__all__ = ["aot_specs"]

_TARGETS = (*ALL_TARGETS, "sm_120")
_NO_FP8 = ("sm_80", "gfx942")


def aot_specs(rows: Any, stats: Any, values: Any) -> list[AotSpec]:
    """List the configurations of the three kernels that stand for all that users meet."""
    # Format, rotation, queries or keys, rows of a program, columns.
    cases = (
        ("int8", False, "q", 64, 128),
        ("int8", False, "k", 128, 128),
        ("int8", True, "k", 128, 128),
        ("fp8", False, "q", 64, 128),
        ("fp8", True, "k", 64, 64),
        ("int4", True, "q", 64, 128),
        ("int4", False, "k", 128, 256),
    )
    specs = [_row_spec(rows, *case) for case in cases]
    specs += [_stats_spec(stats), _value_spec(values, "int8"), _value_spec(values, "fp8")]
    return specs


def _spec(
    name: str, fn: Any, types: dict[str, str], constants: dict[str, Any], warps: int, targets: tuple[str, ...]
) -> AotSpec:
    signature, values = {}, dict(constants)
    for argument in fn.arg_names:
        signature[argument] = types.get(argument, "constexpr")
        if argument not in types:
            values.setdefault(argument, None)
    aligned = [n for n, kind in signature.items() if kind.startswith("*") or n.startswith(("stride_", "k_", "v_"))]
    options: dict[str, Any] = {"num_warps": warps, "enable_fp_fusion": False}
    return AotSpec(name, fn, signature, values, options, targets, divisible_by_16=tuple(aligned))


def _targets(kind: str) -> tuple[str, ...]:
    return tuple(t for t in _TARGETS if kind != "fp8" or t not in _NO_FP8)


def _pointer(kind: str) -> str:
    return {"int8": "*i8", "int4": "*u8", "fp8": "*fp8e4nv"}[kind]


def _row_spec(fn: Any, kind: str, rotate: bool, label: str, block: int, dim: int) -> AotSpec:
    keys = label == "k"
    types = {"x": "*bf16", "table": "*i32", "head_row": "*i32", "out": _pointer(kind), "scale": "*fp32"}
    types |= dict.fromkeys(("tokens", "count", "stride_b", "stride_h", "stride_s"), "i32")
    if keys:
        types |= {"valid": "*u8", "mean": "*fp32"}
    size = dim if rotate else 1
    constants = {"DIM": dim, "WIDTH": dim, "ROWS": block, "BLOCK": block, "KIND": kind, "LIMIT": LIMITS[kind]}
    constants |= {"STEPS": size.bit_length() - 1, "NORM": size**-0.5, "PER_TOKEN": not keys, "HAS_ORDER": True}
    constants |= {"HAS_VALID": keys, "HAS_MEAN": keys}
    name = f"quantize/{label}/{kind}{'/rotated' if rotate else ''}/d{dim}/block{block}"
    return _spec(name, fn, types, constants, max(4, min(16, block * dim // 2048)), _targets(kind))


def _stats_spec(fn: Any) -> AotSpec:
    types = {"k": "*bf16", "v": "*bf16", "table": "*i32", "head_row": "*i32", "valid": "*u8"}
    types |= {"sums": "*fp64", "tops": "*fp32"}
    types |= dict.fromkeys(("tokens", "chunks", "k_b", "k_h", "k_s", "v_b", "v_h", "v_s"), "i32")
    constants = {"DIM": 128, "WIDTH": 128, "ROWS": 16, "CHUNK": 512, "HAS_ORDER": True, "HAS_VALID": True}
    constants |= {"HAS_SUMS": True, "HAS_TOPS": True}
    return _spec("quantize/stats/d128", fn, types, constants, 4, _TARGETS)


def _value_spec(fn: Any, kind: str) -> AotSpec:
    types = {"v": "*bf16", "table": "*i32", "head_row": "*i32", "valid": "*u8", "inverse": "*fp32"}
    types |= {"out": _pointer(kind)}
    types |= dict.fromkeys(("tokens", "columns", "stride_b", "stride_h", "stride_s"), "i32")
    constants: dict[str, Any] = {"DIM": 128, "WIDTH": 128, "ROWS": 128, "KIND": kind, "LIMIT": LIMITS[kind]}
    constants |= {"HAS_ORDER": True, "HAS_VALID": True}
    return _spec(f"quantize/v/{kind}/d128", fn, types, constants, 8, _targets(kind))
