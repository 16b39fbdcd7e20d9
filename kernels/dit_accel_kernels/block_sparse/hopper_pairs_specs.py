"""Shapes of the Hopper kernel for pairs of query blocks as data, and the configurations that stand for all.

Imports no triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..aot_spec import AotSpec
from .hopper_specs import _OPTIONAL, PTX_OPTIONS, padded, tile_layout

__all__ = ["PairsConfig", "pairs_aot_specs", "pairs_config"]

_SPILLS = {"GATHER": 8}
_UNALIGNED = ("table", "lse", "valid", "order", "again", "merged", "told")


@dataclass(frozen=True)
class PairsConfig:
    """How a program is shaped.

    Attributes:
        tile: keys of a step, 64 or 128.
        stages: tiles of K, and as many of V, that fit into the ring.
        fast: take no maximum after the first tile of a row and repeat the pairs for which that fails.
        sorted_rounds: pairs come longest first within groups of heads that hold about this many times as many of them as
            there are programs.
        fetch: the producer asks for the queries of an order one job ahead; otherwise the consumers read them themselves.
        max_programs: at most this many programs, for tests; each then does more pairs.
        consumer_regs: registers of a thread of either consumer; the three groups of warps share 504 a lane.
        producer_regs: registers of a thread of the producer.
        spare: whether ptxas is asked to spare registers.
    """

    tile: int
    stages: int
    fast: bool = True
    sorted_rounds: int = 4
    fetch: bool = True
    max_programs: int | None = None
    consumer_regs: int = 224
    producer_regs: int = 56
    spare: bool = True


def pairs_config(head_dim: int) -> PairsConfig:
    """The shape for a head size of up to 128: the deepest ring that fits."""
    if padded(head_dim) == 64:
        return PairsConfig(tile=128, stages=6, sorted_rounds=8, spare=False)
    return PairsConfig(tile=64, stages=6)


def pairs_aot_specs(kernel: Any) -> list[AotSpec]:
    """List the configurations of ``kernel`` that stand for all that users meet."""
    every = {"EVEN_K": False, "HAS_POOLED": True}
    cases: list[tuple[str, int, str, dict[str, Any]]] = [
        ("plain", 128, "bf16", {}),
        ("plain", 64, "bf16", {}),
        ("ragged", 128, "fp16", {"EVEN_K": False}),
        ("ragged+pooled+order", 128, "bf16", every | {"GATHER": True}),
        ("ragged+pooled+order", 64, "bf16", every | {"GATHER": True}),
        ("ragged+valid+order", 96, "bf16", {"EVEN_K": False, "GATHER": True, "HAS_VALID": True}),
        ("ragged+valid", 64, "fp16", {"EVEN_K": False, "HAS_VALID": True}),
    ]
    return [_spec(kernel, pairs_config(case[1]), *case) for case in cases]


def _spec(kernel: Any, config: PairsConfig, label: str, dim: int, dtype: str, flags: dict[str, Any]) -> AotSpec:
    d = padded(dim)
    values: dict[str, Any] = {
        "D": d,
        "DIM": dim,
        "TILE": config.tile,
        "STAGES": config.stages,
        "EVEN_K": True,
        "HAS_LSE": True,
        "FAST": config.fast and dtype == "bf16",
        "CONSUMER_REGS": config.consumer_regs,
        "PRODUCER_REGS": config.producer_regs,
        "FETCH": config.fetch,
    }
    values |= dict.fromkeys(("HAS_POOLED", "HAS_VALID", "GATHER"), False) | flags
    types = {"q": f"*{dtype}", "out": f"*{dtype}", "lse": "*fp32", "merged": "*i16"}
    types |= dict.fromkeys(("told", "order", "counter", "again"), "*i32")
    part = (64, d) if config.tile == 64 else (64, 64)
    boxes = {"q": (64, d), "o": (64, d), "k": part, "v": part}
    if values["HAS_POOLED"]:
        boxes |= {"pk": (config.tile, d), "pv": (config.tile, d)}
    for name, (rows, columns) in boxes.items():
        types[f"desc_{name}"] = f"tensordesc<{dtype}[1, 1, {rows}, {columns}],{tile_layout()}>"
    for flag in ("HAS_POOLED", "HAS_VALID", "GATHER"):
        if values[flag]:
            types |= _OPTIONAL[flag]
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
        elif name in _NUMBERS or name[-2:] in ("_b", "_h"):
            signature[name] = "i32"
        else:
            signature[name], values[name] = "constexpr", None
    return AotSpec(
        name=f"block_sparse_hopper_pairs/{label}/d{dim}/{dtype}",
        fn=kernel,
        signature=signature,
        constexprs=values,
        options={"num_warps": 4, "launch_pdl": True} | ({"ptx_options": PTX_OPTIONS} if config.spare else {}),
        targets=("sm_90",),
        max_spill_bytes=sum(most for flag, most in _SPILLS.items() if values[flag]),
        gluon=True,
        divisible_by_16=tuple(n for n, kind in signature.items() if kind.startswith("*") and n not in _UNALIGNED),
    )


_NUMBERS = ("sk", "words", "rows", "qb", "kb", "pooled_keys", "heads", "jobs", "in_order", "programs")
