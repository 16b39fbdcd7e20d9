"""Configurations of the 8-bit Triton kernel that are compiled ahead of time. Imports no triton."""

from __future__ import annotations

from typing import Any

from ..aot_spec import ALL_TARGETS, AotSpec
from ..block_sparse.configs import TileConfig
from .configs import pooled_tile, tile_config

__all__ = ["aot_specs"]

_TARGETS = (*ALL_TARGETS, "sm_120")
_NO_FP8 = ("sm_80", "gfx942")
_FLAGS = ("EVEN_K", "HAS_PARTIAL", "HAS_VALID", "HAS_ORDER", "HAS_POOLED", "HAS_MEAN", "HAS_LSE", "TWO_LEVEL")
_ALL = {"EVEN_K": False, "HAS_PARTIAL": True, "HAS_ORDER": True, "HAS_POOLED": True, "HAS_LSE": True}
_PLAIN = {"EVEN_K": True, "HAS_PARTIAL": True, "HAS_ORDER": True}
# Label, head size, format of queries and keys, of values, and what comes with them.
_CASES: tuple[tuple[str, int, str, str, dict[str, bool]], ...] = (
    ("plain", 128, "int8", "bf16", _PLAIN),
    ("plain", 128, "int8", "fp8", _PLAIN),
    ("plain", 128, "fp8", "fp8", _PLAIN),
    ("plain", 128, "int8", "int8", _PLAIN),
    ("plain", 64, "int8", "bf16", _PLAIN),
    ("plain", 64, "int8", "fp8", _PLAIN),
    ("all", 128, "int8", "bf16", _ALL),
    ("all", 128, "int8", "fp8", _ALL),
    ("all", 64, "int8", "int8", _ALL),
    ("all+valid", 256, "int8", "int8", {**_ALL, "HAS_VALID": True}),
)
_POINTERS = {
    **dict.fromkeys(("q_scale", "k_scale", "v_scale", "k_mean", "lse", "bias"), "*fp32"),
    **dict.fromkeys(("row_start", "full", "partial", "indices", "table", "head_row", "bits"), "*i32"),
    "key_valid": "*u8",
}
_OPTIONAL = {
    "HAS_PARTIAL": ("partial",),
    "HAS_VALID": ("key_valid",),
    "HAS_ORDER": ("table", "head_row"),
    "HAS_POOLED": ("pool_k", "pool_v", "bias", "bits"),
    "HAS_MEAN": ("k_mean",),
    "HAS_LSE": ("lse",),
}
# With a remainder, an order and ragged blocks at once, some spill what only prologue and epilogue use; sm_90 and 100 never.
_MAX_SPILL = {"sm_80": 32, "sm_89": 32, "sm_120": 192, "gfx942": 288}
_CODES = {"int8": "i8", "fp8": "fp8e4nv", "bf16": "bf16"}


def aot_specs(kernel: Any) -> list[AotSpec]:
    """List the configurations of ``kernel`` that stand for all that users meet."""
    specs = []
    for target in _TARGETS:
        arch = target if target.startswith("sm_") else "hip"
        for label, dim, qk, pv, flags in _CASES:
            if ("fp8" in (qk, pv) and target in _NO_FP8) or (dim != 128 and target not in ("sm_80", "sm_90")):
                continue
            config = tile_config(arch, dim, pv, 128, 128)
            specs.append(quantized_spec(kernel, target, label, dim, qk, pv, config, flags))
    return specs


def quantized_spec(
    kernel: Any, target: str, label: str, dim: int, qk: str, pv: str, config: TileConfig, flags: dict[str, bool]
) -> AotSpec:
    """One configuration; ``flags`` name what is there besides the mean key and float32 sums across tiles."""
    values: dict[str, Any] = {
        **{name: flags.get(name, name in ("HAS_MEAN", "TWO_LEVEL")) for name in _FLAGS},
        "DIM": dim,
        "WIDTH": dim,
        "BLOCK_Q": 128,
        "BLOCK_K": 128,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_P": pooled_tile(config),
        "PV": "half" if pv == "bf16" else pv,
        "TMA": config.tma,
    }
    n, p, half = config.block_n, pooled_tile(config), pv == "bf16"
    shapes = {"k": (_CODES[qk], n, dim), "v": (_CODES[pv], n, dim) if half else (_CODES[pv], dim, n)}
    shapes |= {"pool_k": ("bf16", p, dim), "pool_v": ("bf16", p, dim)}
    types = {"q_codes": f"*{_CODES[qk]}", "q": "*bf16", "out": "*bf16", **_POINTERS}
    for name, (kind, rows, columns) in shapes.items():
        types[name] = f"tensordesc<{kind}[1, 1, {rows}, {columns}]>" if config.tma else f"*{kind}"
    for flag, names in _OPTIONAL.items():
        if not values[flag]:
            types = {name: kind for name, kind in types.items() if name not in names}
    signature = {}
    for name in kernel.arg_names:
        if name in types:
            signature[name] = types[name]
        elif name in values:
            signature[name] = "constexpr"
        elif name == "scale":
            signature[name] = "fp32"
        elif name in ("sq", "sk") or name[-2:] in ("_b", "_h", "_s"):
            signature[name] = "i32"
        else:
            signature[name], values[name] = "constexpr", None
    aligned = [name for name, kind in signature.items() if kind.startswith("*")]
    aligned += [n for n, kind in signature.items() if kind == "i32" and n.startswith(("q_", "v_", "out_", "pool_"))]
    return AotSpec(
        name=f"quantized/{label}/{qk}_{pv}/d{dim}/{config.block_m}x{n}/w{config.num_warps}/{target}",
        fn=kernel,
        signature=signature,
        constexprs=values,
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
        targets=(target,),
        divisible_by_16=tuple(aligned),
        max_spill_bytes=_MAX_SPILL.get(target, 0),
    )
