"""Configurations of the quantiser's kernels that are compiled ahead of time, and its tiles. Imports no triton."""

from __future__ import annotations

from typing import Any

from ..aot_spec import AotSpec
from .sample import sample_of
from .types import LIMITS

__all__ = ["aot_specs", "tiles"]

_BY_HAND = ("sm_90", "sm_100", "sm_120")  # these have the instructions of ``ASM``
_OTHERS = ("sm_80", "sm_89", "gfx942")
_NO_FP8 = ("sm_80", "gfx942")
_POINTERS = {
    **dict.fromkeys("qkv", "*bf16"),
    **dict.fromkeys(("q_table", "q_head", "k_table", "k_head", "v_out"), "*i32"),
    **dict.fromkeys(("q_scale", "k_scale", "v_scale", "mean", "sums", "tops", "again", "divisors"), "*fp32"),
    **dict.fromkeys(("headroom", "least"), "fp32"),
    "valid": "*u8",
}
_CODES = {"int8": "*i8", "int4": "*u8", "fp8": "*fp8e4nv"}
# What a thread may spill, by columns: a tile of 128 keys of 256 columns is more than its registers hold. With 128 columns
# it is one number, on sm_89 four, kept over the loop through the sample, which few programs run.
_SPILLS = {64: 0, 128: 16, 256: 400}


def tiles(width: int) -> tuple[dict[str, int], dict[str, int]]:
    """Tokens that a program of each launch does at a time, and its warps, for codes of ``width`` columns.

    ``Q_TILE`` queries; ``PART`` sampled keys or values, eight times before the next are asked for; ``V_TILE`` values.
    """
    many = max(1, width // 128)
    first = {"Q_TILE": 64, "PART": 8 * 128 // min(width, 128), "num_warps": 4 * many}
    return first, {"V_TILE": 128, "num_warps": 8 * many}


def aot_specs(queries: Any, keys: Any, mend: Any) -> list[AotSpec]:
    """List the configurations that stand for all that users meet."""
    # Formats, rotation, order and padding, tokens of a key block, columns.
    cases = (
        ("int8", "fp8", False, False, 128, 128),
        ("fp8", "fp8", False, True, 128, 128),  # without smoothing
        ("int8", "fp8", True, True, 64, 128),
        ("fp8", "fp8", False, False, 128, 128),
        ("fp8", "fp8", True, True, 64, 64),
        ("int8", "bf16", False, True, 128, 64),
        ("int8", "int8", False, True, 128, 128),
        ("int4", "bf16", True, True, 128, 128),
        ("int4", "int8", False, False, 128, 256),
    )
    return [
        _spec(name, kernel, i, *case, targets)
        for i, (name, kernel) in enumerate((("queries", queries), ("keys", keys), ("mend", mend)))
        for case in cases
        if name != "mend" or case[1] == "fp8"
        for targets in (_BY_HAND, _OTHERS)
    ]


def _spec(
    label: str, fn: Any, launch: int, kind: str, pv: str, rotate: bool, moved: bool, block: int, dim: int,
    targets: tuple[str, ...],
) -> AotSpec:  # fmt: skip
    size, has_values = dim & -dim if rotate else 1, pv != "bf16"
    smooth = (kind, rotate, moved) != ("fp8", False, True)
    tile = tiles(dim)[min(launch, 1)]
    options: dict[str, Any] = {"num_warps": tile.pop("num_warps"), "enable_fp_fusion": False}
    values: dict[str, Any] = {"DIM": dim, "WIDTH": dim, "BLOCK": block, "ROWS": block, "KIND": kind}
    values |= {"LIMIT": LIMITS[kind], "V_KIND": pv, "V_LIMIT": LIMITS.get(pv, 0.0)}
    values |= {"STEPS": min(size, 128).bit_length() - 1, "NORM": size**-0.5, "K_PARTS": sample_of(1).parts * smooth}
    values |= {"HAS_Q_ORDER": moved, "HAS_ORDER": moved, "HAS_VALID": moved}
    values |= {"V_PARTS": sample_of(1, every=pv == "int8").parts * has_values}
    values |= tile | {"ASM": targets is _BY_HAND, "PDL": targets is _BY_HAND}
    options |= {"launch_pdl": True} if targets is _BY_HAND else {}
    types = dict(_POINTERS) | {"q_out": _CODES[kind], "k_out": _CODES[kind]}
    absent: tuple[str, ...] = () if moved else ("q_table", "q_head", "k_table", "k_head", "valid", "divisors")
    absent += () if has_values else ("v_out", "v_scale")
    absent += () if smooth else ("mean",)
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    for name in fn.arg_names:
        if name in absent:
            signature[name], constants[name] = "constexpr", None
        elif name in values:
            signature[name], constants[name] = "constexpr", values[name]
        else:
            signature[name] = types.get(name, "i32")
    strides = tuple(f"{x}_{axis}" for x in "qkv" for axis in "bhs")
    aligned = [n for n, kind in signature.items() if (kind[0] == "*" or n in strides)]
    chosen = tuple(t for t in targets if "fp8" not in (kind, pv) or t not in _NO_FP8)
    flags = f"{'/rotated' * rotate}{'/moved' * moved}"
    name = f"quantize/{label}/{kind}/{pv}{flags}/d{dim}/block{block}{'/asm' * values['ASM']}"
    return AotSpec(
        name, fn, signature, constants, options, chosen, max_spill_bytes=_SPILLS[dim], divisible_by_16=tuple(aligned)
    )
