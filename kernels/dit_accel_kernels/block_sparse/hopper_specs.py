"""Shapes of the Hopper kernel as data, and the compile-time configurations that stand for all. Imports no triton."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..aot_spec import AotSpec

__all__ = ["PTX_OPTIONS", "HopperConfig", "aot_specs", "hopper_config", "padded", "spares_registers", "tile_layout"]

# Without it ptxas spills more at head size 128, and copies registers in the loops of one consumer.
PTX_OPTIONS = "--register-usage-level=0"


@dataclass(frozen=True)
class HopperConfig:
    """How a program is shaped.

    Attributes:
        stages: tiles of K, and as many of V, that fit into the ring.
        fast: take no maximum after the first tile of a row and repeat the query blocks for which that fails.
        sorted_rounds: query blocks come longest list first within groups of heads that hold about this many times as many
            of them as there are programs; 0 leaves them in order.
        fetch: the producer asks for the queries of an order one job ahead; otherwise the consumers read them themselves.
        late_bias: what a biased tile adds to its products is added after them; otherwise they begin with it.
        max_programs: at most this many programs, for tests; each then does more query blocks.
        consumer_regs: registers of a thread of either consumer; the three groups of warps share 504 a lane.
        producer_regs: registers of a thread of the producer.
        early_release: the buffer of the queries is given back one tile after the output has been put there; otherwise two.
        short_tiles: rows of at most this many tiles of 128 keys on average go to :mod:`.hopper_short` if it can serve them.
    """

    stages: int
    fast: bool = True
    sorted_rounds: int = 4
    fetch: bool = True
    late_bias: bool = True
    max_programs: int | None = None
    consumer_regs: int = 240
    producer_regs: int = 24
    early_release: bool = True
    short_tiles: float = 0.0


def hopper_config(head_dim: int) -> HopperConfig:
    """The shape for a head size of up to 128: the deepest ring that fits, and groups whose keys stay in the L2 cache."""
    parts = 128 // padded(head_dim)
    # Rows of up to 64 tiles are done faster as short lists at every density, of up to 132 or at head size 64 not at all.
    short = 64.0 if parts == 1 else 0.0
    return HopperConfig(stages=3 * parts, sorted_rounds=4 * parts, early_release=parts == 1, short_tiles=short)


def padded(head_dim: int) -> int:
    """Columns of a head in shared memory; TMA fills those that the tensor does not have with 0."""
    return 64 if head_dim <= 64 else 128


def spares_registers(head_dim: int) -> bool:
    """Whether ptxas is asked to: at head size 64 there are enough of them, and a step takes 2 % longer with it."""
    return padded(head_dim) == 128


def tile_layout() -> str:
    """The shared-memory layout of every tile, as the text that Triton writes into a descriptor's type."""
    return (
        "NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4, transposed=False, fp4_padded=False, "
        "cga_layout=[])"
    )


# What a thread may spill, kept over the loops and used once a query block; the loops spill nothing (test_hopper_aot).
# With an order the producer, which has 24 registers, asks for queries; with windows it also packs their codes.
_SPILLS = {"GATHER": 8, "HAS_WINDOWS": 16}
_POINTERS = {
    **dict.fromkeys(("row_start", "full", "indices", "order", "counter", "again"), "*i32"),
    "lse": "*fp32",
}
_SHORT = ("sk", "words", "qb", "kb", "heads", "jobs", "in_order", "programs", "alone")
_UNALIGNED = ("table", "lse", "valid", "order", "again")
_OPTIONAL = {
    "HAS_PARTIAL": {"partial": "*i32"},
    "HAS_POOLED": {"bias": "*fp32", "bits": "*i32"},
    "HAS_VALID": {"valid": "*i1"},
    "HAS_WINDOWS": {"q_lo": "*i32", "q_hi": "*i32", "k_bits": "*i32", "k_base": "*i32"},
    "GATHER": {"table": "*i32", "head_row": "*i32"},
}


def aot_specs(kernel: Any) -> list[AotSpec]:
    """List the configurations of ``kernel`` that stand for all that users meet."""
    every = {"EVEN_K": False, "HAS_PARTIAL": True, "HAS_POOLED": True}
    windows = {"EVEN_K": False, "HAS_PARTIAL": True, "HAS_WINDOWS": True}
    cases: list[tuple[str, int, int, str, dict[str, Any]]] = [
        ("plain", 128, 128, "bf16", {}),
        ("plain", 64, 128, "bf16", {}),
        ("plain", 128, 64, "bf16", {}),
        ("ragged", 128, 128, "bf16", {"EVEN_K": False, "HAS_PARTIAL": True}),
        ("ragged", 128, 128, "fp16", {"EVEN_K": False, "HAS_PARTIAL": True}),
        ("ragged", 64, 64, "bf16", {"EVEN_K": False, "HAS_PARTIAL": True}),
        ("ragged+pooled", 128, 64, "bf16", every),
        ("ragged+pooled", 128, 128, "fp16", every),
        ("ragged+pooled+order", 128, 128, "bf16", every | {"GATHER": True}),
        ("ragged+pooled+order", 128, 64, "bf16", every | {"GATHER": True}),
        ("ragged+pooled+order", 64, 64, "bf16", every | {"GATHER": True}),
        ("windows+order", 128, 128, "bf16", {"HAS_PARTIAL": True, "HAS_WINDOWS": True, "GATHER": True}),
        ("ragged+windows+order", 128, 64, "bf16", windows | {"GATHER": True}),
        ("ragged+windows+valid", 64, 64, "fp16", windows | {"HAS_VALID": True}),
        ("ragged+valid+order", 96, 64, "bf16", every | {"GATHER": True, "HAS_VALID": True, "HAS_POOLED": False}),
        ("ragged+valid", 64, 64, "fp16", every | {"HAS_VALID": True, "HAS_POOLED": False}),
    ]
    specs = [(case[1], _spec(kernel, *case)) for case in cases]
    return [spec if spares_registers(dim) else replace(spec, options=_without_ptx(spec)) for dim, spec in specs]


def _without_ptx(spec: AotSpec) -> dict[str, Any]:
    return {name: value for name, value in spec.options.items() if name != "ptx_options"}


def _spec(kernel: Any, label: str, dim: int, block_k: int, dtype: str, flags: dict[str, Any]) -> AotSpec:
    config, d = hopper_config(dim), padded(dim)
    values: dict[str, Any] = {
        "D": d,
        "DIM": dim,
        "BLOCK_K": block_k,
        "STAGES": config.stages,
        "EVEN_K": True,
        "HAS_LSE": True,
        "FAST": config.fast and dtype == "bf16",
        "CONSUMER_REGS": config.consumer_regs,
        "PRODUCER_REGS": config.producer_regs,
        "FETCH": config.fetch,
        "LATE_BIAS": config.late_bias,
        "RELEASE": 0 if config.early_release else 1,
    }
    values |= dict.fromkeys(_OPTIONAL, False)
    values |= flags
    types = {"q": f"*{dtype}", "out": f"*{dtype}", **_POINTERS}
    boxes = {"q": (64, d), "o": (64, d), "k": (128, d), "v": (128, d)}
    if block_k == 64:
        boxes |= {"k": (64, 64), "v": (64, 64)}
    if values["HAS_POOLED"]:
        boxes |= {"pk": (128, d), "pv": (128, d)}
    for name, (rows, columns) in boxes.items():
        types[f"desc_{name}"] = f"tensordesc<{dtype}[1, 1, {rows}, {columns}],{tile_layout()}>"
    for flag, pointers in _OPTIONAL.items():
        if values[flag]:
            types |= pointers
    signature = {}
    for name in kernel.arg_names:
        if name in types:
            signature[name] = types[name]
        elif name in values:
            signature[name] = "constexpr"
        elif name in ("scale2", "inv_scale"):
            signature[name] = "fp32"
        elif name in ("table_s", "q_b", "q_h", "q_s", "out_b", "out_h", "out_s"):
            signature[name] = "i64"
        elif name in _SHORT or name[-2:] in ("_b", "_h"):
            signature[name] = "i32"
        else:
            signature[name], values[name] = "constexpr", None
    return AotSpec(
        name=f"block_sparse_hopper/{label}/d{dim}/128x{block_k}/{dtype}",
        fn=kernel,
        signature=signature,
        constexprs=values,
        options={"num_warps": 4, "launch_pdl": True, "ptx_options": PTX_OPTIONS},
        targets=("sm_90",),
        max_spill_bytes=sum(most for flag, most in _SPILLS.items() if values[flag]),
        gluon=True,
        divisible_by_16=tuple(n for n, kind in signature.items() if kind.startswith("*") and n not in _UNALIGNED),
    )
