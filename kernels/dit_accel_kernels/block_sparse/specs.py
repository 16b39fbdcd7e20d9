"""Representative compile-time configurations of the Triton kernel, for ahead-of-time compilation. Imports no triton."""

from __future__ import annotations

from typing import Any

from .._common import split_head_dim
from ..aot_spec import ALL_TARGETS, AotSpec
from .configs import TileConfig, gather_tile, tile_config

__all__ = ["aot_specs"]

_POINTERS = {
    "row_start": "*i32",
    "full": "*i32",
    "indices": "*i32",
    "lse": "*fp32",
}
_OPTIONAL = {
    "HAS_PARTIAL": {"partial": "*i32"},
    "HAS_ORDER": {"table": "*i32", "head_row": "*i32"},
    "HAS_POOLED": {"bias": "*fp32", "bits": "*i32"},
    "HAS_WINDOWS": {"q_lo": "*i32", "q_hi": "*i32", "k_code": "*i32"},
    "HAS_VALID": {"key_valid": "*u8"},
    "HAS_GATHERED": {"more_bias": "*fp32", "more_start": "*i32", "more_count": "*i32", "more_indices": "*i32"},
}
# ptxas spills what only the prologue and epilogue use, and some addresses of the pooled and masked loops; the plain loop
# reloads at most 20 words per tile of 670 instructions.
_MAX_SPILL = {"sm_100": 768}
_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


def aot_specs(kernel: Any) -> list[AotSpec]:
    """List the configurations of ``kernel`` that stand for all that users meet."""
    specs = []
    for target in ALL_TARGETS:
        arch = target if target.startswith("sm_") else "hip"
        precision = "tf32x3" if target.startswith("sm_") else "ieee"
        everything = {"EVEN_K": False, "HAS_POOLED": True, "HAS_ORDER": True}
        cases: list[tuple[str, int, str, dict[str, bool]]] = [
            ("plain", 64, "bf16", {}),
            ("plain", 128, "bf16", {}),
            ("ragged", 128, "fp16", {"EVEN_K": False}),
            ("ragged", 96, "bf16", {"EVEN_K": False}),
            ("ragged", 72, "bf16", {"EVEN_K": False}),
            ("plain", 256, "bf16", {}),
            ("pooled+order", 64, "bf16", {"HAS_POOLED": True, "HAS_ORDER": True}),
            ("pooled+order", 128, "bf16", {"HAS_POOLED": True, "HAS_ORDER": True}),
            ("ragged+pooled+order", 128, "bf16", {"EVEN_K": False, "HAS_POOLED": True, "HAS_ORDER": True}),
            ("ragged+pooled+order", 64, "bf16", {"EVEN_K": False, "HAS_POOLED": True, "HAS_ORDER": True}),
            ("ragged+pooled+order", 96, "bf16", {"EVEN_K": False, "HAS_POOLED": True, "HAS_ORDER": True}),
            ("windows", 128, "bf16", {"HAS_PARTIAL": True, "HAS_WINDOWS": True}),
            ("near windows", 128, "bf16", {"HAS_PARTIAL": True, "HAS_WINDOWS": True, "NEAR_WINDOWS": True}),
            ("valid", 128, "bf16", {"HAS_VALID": True, "EVEN_K": False}),
            ("ragged", 128, "fp32", {"EVEN_K": False}),
            ("gathered", 64, "bf16", {"HAS_GATHERED": True}),
            ("gathered", 128, "bf16", {"HAS_GATHERED": True}),
            ("gathered", 256, "bf16", {"HAS_GATHERED": True}),
            ("ragged+gathered", 128, "fp32", {"EVEN_K": False, "HAS_GATHERED": True}),
            ("ragged+gathered+pooled+order", 64, "bf16", {**everything, "HAS_GATHERED": True}),
            ("ragged+gathered+pooled+order", 72, "fp16", {**everything, "HAS_GATHERED": True}),
            ("ragged+gathered+pooled+order", 128, "bf16", {**everything, "HAS_GATHERED": True}),
        ]
        for label, dim, dtype, flags in cases:
            config = tile_config(arch, dim, _BYTES[dtype], 128, 128)
            specs.append(_spec(kernel, target, label, dim, dtype, config, precision, flags))
    return specs


def _spec(
    kernel: Any,
    target: str,
    label: str,
    dim: int,
    dtype: str,
    config: TileConfig,
    precision: str,
    flags: dict[str, bool],
) -> AotSpec:
    d0, d1 = split_head_dim(dim)
    values: dict[str, Any] = {
        "D": dim,
        "D0": d0,
        "D1": d1,
        "BLOCK_Q": 128,
        "BLOCK_K": 128,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "TMA": config.tma,
        "PRECISION": precision if dtype == "fp32" else "tf32",
        "EVEN_K": flags.get("EVEN_K", True),
        "HAS_LSE": True,
        "GROUP": 8 if flags.get("HAS_GATHERED") else 1,
        "BLOCK_G": gather_tile(config),
        "NEAR_WINDOWS": flags.get("NEAR_WINDOWS", False),
    }
    values.update({name: flags.get(name, False) for name in _OPTIONAL})
    types: dict[str, str] = {"q": f"*{dtype}", "out": f"*{dtype}", **_POINTERS}
    for part in ("k", "v", "pool_k", "pool_v") if values["HAS_POOLED"] else ("k", "v"):
        types[part] = f"*{dtype}"
        for name, width in ((part, d0), (f"{part}_hi", d1)):
            if config.tma and width:
                types[name] = f"tensordesc<{dtype}[1, 1, {config.block_n}, {width}]>"
    if values["HAS_GATHERED"]:
        types |= {"more_k": f"*{dtype}", "more_v": f"*{dtype}"}
    for flag, pointers in _OPTIONAL.items():
        if values[flag]:
            types.update(pointers)
    if values["NEAR_WINDOWS"]:
        types["k_base"] = "*i32"
    signature = {}
    for name in kernel.arg_names:
        if name in types:
            signature[name] = types[name]
        elif name in values:
            signature[name] = "constexpr"
        elif name == "scale":
            signature[name] = "fp32"
        elif name in ("sq", "sk", "se") or name[-2:] in ("_b", "_h", "_s"):
            signature[name] = "i32"
        else:
            signature[name], values[name] = "constexpr", None
    aligned = [n for n, kind in signature.items() if kind.startswith("*")]
    strided = ("q_", "k_", "v_", "out_", "pool_", "more_k_", "more_v_")
    aligned += [n for n, kind in signature.items() if kind == "i32" and n.startswith(strided)]
    return AotSpec(
        name=f"block_sparse/{label}/d{dim}/{config.block_m}x{config.block_n}/{dtype}/{target}",
        fn=kernel,
        signature=signature,
        constexprs=values,
        max_spill_bytes=_MAX_SPILL.get(target, 512),
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
        targets=(target,),
        divisible_by_16=tuple(aligned),
    )
