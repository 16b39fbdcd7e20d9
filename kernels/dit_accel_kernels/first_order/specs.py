"""First-order terms compiled ahead of time."""

from __future__ import annotations

from typing import Any

from ..aot_spec import ALL_TARGETS, AotSpec
from .matrices import matrices_kernel
from .triton import apply_kernel, covariance_kernel, weights_kernel

__all__ = ["AOT_SPECS"]

_FLOATS = ("LSE", "MIDDLE", "CENTRE", "BIAS")
_INTS = ("TABLE", "HEAD", "BITS")
_SCRATCH = ("WEIGHT", "COV", "MATRIX")


def _spec(name: str, fn: Any, dtype: str, constants: dict[str, Any], options: dict[str, int], **more: Any) -> AotSpec:
    kind = "fp32" if dtype == "fp32" else "bf16"

    def of(argument: str) -> str:
        if argument in constants:
            return "constexpr"
        if argument in _FLOATS:
            return "*fp32"
        if argument in _INTS:
            return "*i32"
        if argument in _SCRATCH:
            return f"*{kind}"
        if argument in ("VALID", "scale"):
            return {"VALID": "*u8", "scale": "fp32"}[argument]
        return f"*{dtype}" if argument.isupper() else "i32"

    signature = {argument: of(argument) for argument in fn.arg_names} | more.pop("types", {})
    aligned = tuple(
        a
        for a, kind in signature.items()
        if (kind.startswith("*") and kind != "*u8" and a != "BITS")
        or a[1:] in ("_b", "_h", "_s")
        or a in ("pitch", "size")
    )
    return AotSpec(
        name=f"first_order/{name}/{dtype}", fn=fn, signature=signature, constexprs=constants, options=options,
        divisible_by_16=tuple(a for a in aligned if not a.startswith(("bits", "bias"))), **more,
    )  # fmt: skip


def _product(dtype: str, tiles: tuple[int, int, int], options: dict[str, int], targets: tuple[str, ...]) -> AotSpec:
    m, n, k = tiles
    tma = targets[0] == "sm_90" and dtype != "fp32"
    constants: dict[str, Any] = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "TMA": tma}
    constants["PRECISION"] = "ieee" if dtype == "fp32" else "tf32"
    kind = "fp32" if dtype == "fp32" else "bf16"
    shapes = {"WEIGHT": (m, k), "COV": (k, n), "OUT": (m, n)}
    types = {x: f"tensordesc<{kind}[1, {a}, {b}]>" if tma else f"*{kind}" for x, (a, b) in shapes.items()}
    return _spec(f"matrices/{m}x{n}", matrices_kernel, dtype, constants, options, types=types, targets=targets)


def _all(dim: int, width: int, dtype: str, valid: bool) -> list[AotSpec]:
    wide = dtype == "fp32"
    part, tile = (32, 16) if wide else (dim, 64)
    sizes = {"DIM": dim, "WIDTH": width, "PRECISION": "ieee" if wide else "tf32"}
    parts = {"BLOCK": 64, **sizes, "PART": part, "SPAN": 1 << (part - 1).bit_length()}
    weights = {"BLOCK": 64, **sizes, "BLOCK_M": 16, "BLOCK_N": tile, "STEP": 32, "HAS_ORDER": True}
    apply = {**parts, "BLOCK_M": tile, "HAS_ORDER": True, "HAS_MORE": valid}
    few, many = {"num_warps": 4, "num_stages": 2}, {"num_warps": 8 if width >= 128 else 4, "num_stages": 2}
    # Spills: one register on sm_89.
    return [
        _spec(f"weights/d{dim}", weights_kernel, dtype, weights, few, max_spill_bytes=4),
        _spec(
            f"covariance/d{dim}",
            covariance_kernel,
            dtype,
            {**parts, "STEP": tile, "HAS_VALID": valid},
            many,
            max_spill_bytes=4,
        ),
        _spec(f"apply/d{dim}", apply_kernel, dtype, apply, many),
    ]


AOT_SPECS = [
    *_all(128, 128, "bf16", False),
    *_all(64, 64, "fp16", True),
    *_all(72, 128, "fp32", True),
    _product("bf16", (128, 128, 32), {"num_warps": 4, "num_stages": 4}, ("sm_90", "sm_100")),
    _product("bf16", (128, 256, 64), {"num_warps": 8, "num_stages": 3}, ("sm_90", "sm_100")),
    _product("bf16", (64, 128, 32), {"num_warps": 4, "num_stages": 3}, ("sm_80", "sm_89", "gfx942")),
    _product("fp32", (64, 64, 32), {"num_warps": 4, "num_stages": 2}, ALL_TARGETS),
]
