"""Shapes of the block-mass kernel for Hopper, and the configurations that stand for all. Imports no triton."""

from __future__ import annotations

from typing import Any

from ..aot_spec import AotSpec
from ..block_sparse.hopper_specs import padded, tile_layout

__all__ = ["CONSUMER_REGS", "GROUP", "OTHER_REGS", "aot_specs", "by_polynomial", "ring_stages"]

# Tiles whose partial sums a reducer gets at once, and registers of a thread: the five groups of warps share 480 a lane.
GROUP = 8
CONSUMER_REGS = 112
OTHER_REGS = 32


def ring_stages(head_dim: int) -> int:
    """Tiles of keys that fit beside the queries and the partial sums."""
    return 3 if padded(head_dim) == 128 else 6


def by_polynomial(head_dim: int) -> bool:
    """Whether some exponentials are polynomials: only where the special-function unit takes longer than the product.

    With head sizes of 128 both take 4096 clocks for two tiles, and polynomials made a call 11 % slower.
    """
    return padded(head_dim) == 64


def aot_specs(kernel: Any) -> list[AotSpec]:
    """List the configurations of ``kernel`` that stand for all that users meet."""
    cases: list[tuple[str, int, str, dict[str, Any]]] = [
        ("128x128", 128, "bf16", {"PER": 1, "JOIN": True, "EACH": 1}),
        ("128x64/ragged", 64, "bf16", {"PER": 2, "JOIN": True, "EACH": 1, "EVEN_K": False}),
        ("64x64/ragged", 128, "bf16", {"PER": 2, "JOIN": False, "EACH": 1, "EVEN_K": False}),
        ("64x64/valid", 64, "fp16", {"PER": 2, "JOIN": False, "EACH": 1, "EVEN_K": False, "HAS_VALID": True}),
        ("16x128/ragged", 96, "bf16", {"PER": 1, "JOIN": False, "EACH": 4, "EVEN_K": False}),
    ]
    return [_spec(kernel, *case) for case in cases]


def _spec(kernel: Any, label: str, dim: int, dtype: str, flags: dict[str, Any]) -> AotSpec:
    d = padded(dim)
    values: dict[str, Any] = {
        "D": d,
        "DIM": dim,
        "STAGES": ring_stages(dim),
        "GROUP": GROUP,
        "EVEN_K": True,
        "HAS_VALID": False,
        "CONSUMER_REGS": CONSUMER_REGS,
        "OTHER_REGS": OTHER_REGS,
        "POLYNOMIALS": by_polynomial(dim),
    } | flags
    types = {
        "desc_k": f"tensordesc<{dtype}[1, 1, 128, {d}],{tile_layout()}>",
        "q": f"*{dtype}",
        "token": "*i32",
        "shift": "*fp32",
        "out": "*fp32",
        "scale2": "fp32",
        **dict.fromkeys(("q_b", "q_h", "q_s"), "i64"),
    }
    if values["HAS_VALID"]:
        types["valid"] = "*i1"
    signature = {}
    for name in kernel.arg_names:
        if name in values:
            signature[name] = "constexpr"
        elif name == "valid" and name not in types:
            signature[name], values[name] = "constexpr", None
        else:
            signature[name] = types.get(name, "i32")
    return AotSpec(
        name=f"block_mass_hopper/{label}/d{dim}/{dtype}",
        fn=kernel,
        signature=signature,
        constexprs=values,
        options={"num_warps": 4},
        targets=("sm_90",),
        max_spill_bytes=16,  # read once a job; the loops spill nothing
        gluon=True,
        divisible_by_16=("q", "token", "shift", "out"),
    )
