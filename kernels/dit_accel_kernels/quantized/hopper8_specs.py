"""Shapes of the 8-bit Hopper kernel as data, and the compile-time configurations that stand for all. Imports no triton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..aot_spec import AotSpec

__all__ = ["Hopper8Config", "aot_specs", "hopper8_config", "tile_layout"]


@dataclass(frozen=True)
class Hopper8Config:
    """How a program is shaped.

    Attributes:
        stages: tiles of K, and as many of V, that fit into the ring.
        headroom: with e4m3 weights, binary orders of magnitude that the largest weight of a fresh base has above 1.
        turns: with e4m3 weights, whether the consumers take turns in starting products.
        lines: with e4m3 weights, take half of the exponentials as straight lines between powers of two.
        sorted_rounds: query blocks come longest list first within groups of heads that hold about this many times as many
            of them as there are programs; 0 leaves them in order.
        max_programs: at most this many programs, for tests; each then does more query blocks.
        consumer_regs: registers of a thread of either consumer; the three groups of warps share 504 a lane.
        producer_regs: registers of a thread of the producer.
    """

    stages: int
    headroom: float = 3.0
    turns: bool = True
    lines: bool = True
    sorted_rounds: int = 4
    max_programs: int | None = None
    consumer_regs: int = 240
    producer_regs: int = 24


def hopper8_config(columns: int, pv: str) -> Hopper8Config:
    """The shape for a head of 64 or 128 columns of codes.

    Args:
        columns: of queries and keys.
        pv: format of the values, ``"fp8"`` or ``"bf16"`` for 16 bits.
    """
    # Turns were measured with 128 columns only.
    return Hopper8Config(stages=(4 if pv == "fp8" else 3) * (128 // columns), turns=columns == 128)


def tile_layout(swizzle: int, bits: int) -> str:
    """The shared-memory layout of a tile, as the text that Triton writes into a descriptor's type."""
    return (
        f"NVMMASharedLayout(swizzle_byte_width={swizzle}, element_bitwidth={bits}, rank=4, transposed=False, "
        "fp4_padded=False, cga_layout=[])"
    )


# What a thread may spill, kept over the loops and used once a query block; the loops spill nothing (test_hopper8_aot).
_SPILLS = {64: 32, 128: 200}
_TYPES = {"int8": "i8", "fp8": "fp8e4nv"}
_POINTERS = {
    **dict.fromkeys(("row_start", "full", "indices", "order", "counter"), "*i32"),
    **dict.fromkeys(("lse", "q_scale", "k_scale", "v_scale"), "*fp32"),
}
_UNALIGNED = ("table", "lse", "order")


def aot_specs(kernel: Any) -> list[AotSpec]:
    """List the configurations of ``kernel`` that stand for all that users meet."""
    ragged = {"EVEN_K": False, "HAS_PARTIAL": True}
    cases: list[tuple[str, int, int, str, str, str, dict[str, Any]]] = [
        ("plain", 128, 128, "int8", "bf16", "bf16", {}),
        ("plain", 128, 128, "int8", "fp8", "bf16", {}),
        ("plain", 128, 128, "fp8", "fp8", "bf16", {}),
        ("plain", 64, 128, "int8", "bf16", "bf16", {}),
        ("plain", 64, 128, "int8", "fp8", "bf16", {}),
        ("plain", 64, 128, "fp8", "fp8", "bf16", {}),
        ("ragged+order", 128, 64, "int8", "bf16", "bf16", ragged | {"GATHER": True}),
        ("ragged+order", 128, 64, "int8", "fp8", "bf16", ragged | {"GATHER": True}),
        ("ragged+order", 128, 64, "fp8", "fp8", "fp16", ragged | {"GATHER": True}),
        ("ragged+order", 64, 64, "int8", "fp8", "bf16", ragged | {"GATHER": True}),
    ]
    return [_spec(kernel, *case) for case in cases]


def _spec(
    kernel: Any, label: str, dim: int, block_k: int, qk: str, pv: str, dtype: str, flags: dict[str, Any]
) -> AotSpec:
    config = hopper8_config(dim, pv)
    values: dict[str, Any] = {
        "D": dim,
        "DIM": dim,
        "BLOCK_K": block_k,
        "STAGES": config.stages,
        "EVEN_K": True,
        "HAS_LSE": True,
        "HAS_PARTIAL": False,
        "GATHER": False,
        "HEADROOM": config.headroom,
        "TURNS": config.turns,
        "LINES": config.lines,
        "CONSUMER_REGS": config.consumer_regs,
        "PRODUCER_REGS": config.producer_regs,
    }
    values |= flags
    types = {"out": f"*{dtype}", **_POINTERS}
    if values["HAS_PARTIAL"]:
        types["partial"] = "*i32"
    if values["GATHER"]:
        types |= {"table": "*i32", "head_row": "*i32"}
    code = f"{_TYPES[qk]}[1, 1, {{}}, {dim}],{tile_layout(dim, 8)}"
    types |= {"desc_q": f"tensordesc<{code.format(64)}>", "desc_k": f"tensordesc<{code.format(block_k)}>"}
    wide = f"{dtype}[1, 1, {{}}, {{}}],{tile_layout(128, 16)}"
    if pv == "fp8":
        types["desc_v"] = f"tensordesc<fp8e4nv[1, 1, {dim}, 64],{tile_layout(64, 8)}>"
    else:
        types["desc_v"] = f"tensordesc<{wide.format(*((128, dim) if block_k == 128 else (64, 64)))}>"
    types["desc_o"] = f"tensordesc<{wide.format(64, dim)}>"
    signature = {}
    for name in kernel.arg_names:
        if name in types and not (name == "desc_o" and values["GATHER"]):
            signature[name] = types[name]
        elif name in values:
            signature[name] = "constexpr"
        elif name in ("scale2", "limit"):
            signature[name] = "fp32"
        elif name in ("out_b", "out_h", "out_s"):
            signature[name] = "i64"
        elif name in ("table", "head_row", "partial", "desc_o"):
            signature[name], values[name] = "constexpr", None
        else:
            signature[name] = "i32"
    return AotSpec(
        name=f"quantized_hopper/{label}/{qk}/{pv}/d{dim}/128x{block_k}/{dtype}",
        fn=kernel,
        signature=signature,
        constexprs=values,
        options={"num_warps": 4, "launch_pdl": True},
        targets=("sm_90",),
        max_spill_bytes=_SPILLS[dim],
        gluon=True,
        divisible_by_16=tuple(n for n, kind in signature.items() if kind.startswith("*") and n not in _UNALIGNED),
    )
