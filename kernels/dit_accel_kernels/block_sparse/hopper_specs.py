"""Shapes of the Hopper kernel as data, and the compile-time configurations that stand for all. Imports no triton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..aot_spec import AotSpec

__all__ = ["HopperConfig", "aot_specs", "hopper_config", "tile_layout"]


@dataclass(frozen=True)
class HopperConfig:
    """How a program is shaped.

    Attributes:
        stages: tiles of K, and as many of V, that fit into the ring.
        q_stages: query blocks that fit into shared memory; with 2 the next one is fetched early.
        persistent: start one program per multiprocessor, which does many query blocks, instead of one per query block.
        pingpong: let the two warpgroups issue their products in turns.
        max_programs: at most this many programs, for tests; each then does many query blocks.
        consumer_regs: registers of a thread of either consumer; the three groups of warps share 504 a lane.
        producer_regs: registers of a thread of the producer.
    """

    stages: int
    q_stages: int
    persistent: bool
    pingpong: bool
    max_programs: int | None = None
    consumer_regs: int = 240
    producer_regs: int = 24


def hopper_config(head_dim: int, block_k: int) -> HopperConfig:
    """The shape for a head size of 64 or 128 and key blocks of 64 or 128 tokens.

    One program per query block: with rows of equal length a persistent grid is as fast, with uneven rows a third slower
    (H200, see ``docs/hopper_notes.md``).
    """
    stages = 2 * (128 // head_dim) * (128 // block_k)
    return HopperConfig(stages=min(stages, 4), q_stages=2, persistent=False, pingpong=False)


def tile_layout() -> str:
    """The shared-memory layout of every tile, as the text that Triton writes into a descriptor's type."""
    return (
        "NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4, transposed=False, fp4_padded=False, "
        "cga_layout=[])"
    )


_POINTERS = {"row_start": "*i32", "full": "*i32", "indices": "*i32", "lse": "*fp32"}
_OPTIONAL = {
    "HAS_PARTIAL": {"partial": "*i32"},
    "HAS_POOLED": {"bias": "*fp32", "bits": "*i32"},
    "GATHER": {"table": "*i32", "head_row": "*i32"},
}


def aot_specs(kernel: Any) -> list[AotSpec]:
    """List the configurations of ``kernel`` that stand for all that users meet."""
    every = {"EVEN_K": False, "HAS_PARTIAL": True, "HAS_POOLED": True}
    cases: list[tuple[str, int, int, str, dict[str, bool]]] = [
        ("plain", 128, 128, "bf16", {}),
        ("plain", 64, 128, "bf16", {}),
        ("ragged", 128, 128, "fp16", {"EVEN_K": False, "HAS_PARTIAL": True}),
        ("ragged", 64, 64, "fp16", {"EVEN_K": False, "HAS_PARTIAL": True}),
        ("ragged", 128, 64, "bf16", {"EVEN_K": False, "HAS_PARTIAL": True}),
        ("ragged+pooled", 128, 128, "bf16", every),
        ("ragged+pooled", 64, 128, "bf16", every),
        ("ragged+pooled", 128, 64, "bf16", every),
        ("ragged+pooled+order", 128, 128, "bf16", every | {"GATHER": True}),
        ("ragged+pooled+order", 64, 128, "bf16", every | {"GATHER": True}),
        ("order", 128, 128, "bf16", {"GATHER": True, "HAS_PARTIAL": True}),
        ("turns", 128, 128, "bf16", {"PINGPONG": True}),
    ]
    return [_spec(kernel, *case) for case in cases]


def _spec(kernel: Any, label: str, dim: int, block_k: int, dtype: str, flags: dict[str, bool]) -> AotSpec:
    config = hopper_config(dim, block_k)
    values: dict[str, Any] = {
        "D": dim,
        "BLOCK_N": block_k,
        "STAGES": config.stages,
        "Q_STAGES": config.q_stages,
        "EVEN_K": flags.get("EVEN_K", True),
        "HAS_LSE": True,
        "PINGPONG": flags.get("PINGPONG", config.pingpong),
        "CONSUMER_REGS": config.consumer_regs,
        "PRODUCER_REGS": config.producer_regs,
    }
    values |= {name: flags.get(name, False) for name in _OPTIONAL}
    types = {"q": f"*{dtype}", "out": f"*{dtype}", **_POINTERS}
    for name in ("q", "k", "v", "o", "pk", "pv") if values["HAS_POOLED"] else ("q", "k", "v", "o"):
        rows = 64 if name in "qo" else block_k
        types[f"desc_{name}"] = f"tensordesc<{dtype}[1, 1, {rows}, {dim}],{tile_layout()}>"
    for flag, pointers in _OPTIONAL.items():
        if values[flag]:
            types |= pointers
    signature = {}
    for name in kernel.arg_names:
        if name in types:
            signature[name] = types[name]
        elif name in values:
            signature[name] = "constexpr"
        elif name == "scale2":
            signature[name] = "fp32"
        elif name in ("table_s", "q_b", "q_h", "q_s", "out_b", "out_h", "out_s"):
            signature[name] = "i64"
        elif name in ("sq", "tail", "words", "qb", "kb", "heads", "jobs", "programs") or name[-2:] in ("_b", "_h"):
            signature[name] = "i32"
        else:
            signature[name], values[name] = "constexpr", None
    return AotSpec(
        name=f"block_sparse_hopper/{label}/d{dim}/128x{block_k}/{dtype}",
        fn=kernel,
        signature=signature,
        constexprs=values,
        options={"num_warps": 4},
        targets=("sm_90",),
        gluon=True,
        divisible_by_16=tuple(n for n, kind in signature.items() if kind.startswith("*") and n not in ("table", "lse")),
    )
