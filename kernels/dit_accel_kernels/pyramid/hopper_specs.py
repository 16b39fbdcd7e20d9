"""Shapes of the Hopper kernel with gathered keys as data, and the configurations that stand for all. Imports no triton."""

from __future__ import annotations

from typing import Any

from ..aot_spec import AotSpec
from ..block_sparse.hopper_specs import hopper_config, padded, tile_layout

__all__ = ["aot_specs"]


# As of the block-sparse kernel, and what a thread of the producer keeps over its loops.
_SPILLS = {64: 60, 128: 140}
_POINTERS = {
    **dict.fromkeys(("row_start", "full", "indices", "order", "counter", "again"), "*i32"),
    **dict.fromkeys(("more_start", "more_count", "more_indices"), "*i32"),
    "lse": "*fp32",
    "more_bias": "*fp32",
    "more_biased": "*i1",
}
_UNALIGNED = (
    "table",
    "lse",
    "valid",
    "order",
    "again",
    "more_bias",
    "more_biased",
    "more_start",
    "more_count",
    "more_indices",
)
_OPTIONAL = {
    "HAS_PARTIAL": {"partial": "*i32"},
    "HAS_POOLED": {"bias": "*fp32", "bits": "*i32"},
    "HAS_VALID": {"valid": "*i1"},
    "GATHER": {"table": "*i32", "head_row": "*i32"},
}
_LONG = ("table_s", "q_b", "q_h", "q_s", "out_b", "out_h", "out_s", *(f"more_{x}_{a}" for x in "kv" for a in "bh"))
_SHORT = ("sk", "words", "qb", "kb", "heads", "jobs", "in_order", "programs", "se", "more_s")


def aot_specs(kernel: Any) -> list[AotSpec]:
    """List the configurations of ``kernel`` that stand for all that users meet."""
    every = {"EVEN_K": False, "HAS_PARTIAL": True, "HAS_POOLED": True}
    cases: list[tuple[str, int, int, int, str, dict[str, Any]]] = [
        ("plain", 128, 128, 16, "bf16", {}),
        ("plain", 128, 64, 8, "fp16", {}),
        ("plain", 64, 128, 1, "bf16", {}),
        ("ragged+pooled+order", 128, 128, 1, "bf16", every | {"GATHER": True}),
        ("ragged+valid+order", 72, 64, 8, "bf16", every | {"GATHER": True, "HAS_VALID": True, "HAS_POOLED": False}),
    ]
    return [_spec(kernel, *case) for case in cases]


def _spec(kernel: Any, label: str, dim: int, block_k: int, group: int, dtype: str, flags: dict[str, Any]) -> AotSpec:
    config, d = hopper_config(dim), padded(dim)
    values: dict[str, Any] = {
        "D": d,
        "DIM": dim,
        "BLOCK_K": block_k,
        "STAGES": config.stages,
        "EVEN_K": True,
        "HAS_LSE": True,
        "FAST": config.fast and dtype == "bf16",
        "GROUP": group,
        "LATE_BIAS": config.late_bias,
        "CONSUMER_REGS": config.consumer_regs,
        "PRODUCER_REGS": config.producer_regs,
    }
    values |= dict.fromkeys(_OPTIONAL, False)
    values |= flags
    types = {name: f"*{dtype}" for name in ("q", "out", "more_k", "more_v")} | _POINTERS
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
    types |= dict.fromkeys(("scale2", "inv_scale"), "fp32") | dict.fromkeys(_LONG, "i64") | dict.fromkeys(_SHORT, "i32")
    signature = {}
    for name in kernel.arg_names:
        if name in types:
            signature[name] = types[name]
        elif name in values:
            signature[name] = "constexpr"
        elif name[-2:] in ("_b", "_h"):
            signature[name] = "i32"
        else:
            signature[name], values[name] = "constexpr", None
    return AotSpec(
        name=f"gathered_hopper/{label}/d{dim}/128x{block_k}/groups-of-{group}/{dtype}",
        fn=kernel,
        signature=signature,
        constexprs=values,
        options={"num_warps": 4},
        targets=("sm_90",),
        max_spill_bytes=_SPILLS[d],
        gluon=True,
        divisible_by_16=tuple(n for n, kind in signature.items() if kind.startswith("*") and n not in _UNALIGNED),
    )
