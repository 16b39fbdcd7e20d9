"""Shapes of the mean-query kernel for Hopper, and the configurations that stand for all. Imports no triton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..aot_spec import AotSpec
from ..block_sparse.hopper_specs import padded, tile_layout

__all__ = ["MeansConfig", "aot_specs", "means_config"]


@dataclass(frozen=True)
class MeansConfig:
    """How a program is shaped.

    Attributes:
        warpgroups: consumers, of 64 mean queries each.
        stages: tiles of keys, and as many of values, in the ring.
        consumer_regs: registers of a thread of a consumer.
        loader_regs: registers of a thread of the loader.
        overlap: exponentials run under the products of the same consumer, if weights are relative to the first tile.
        fast: take no maximum after the first tile of a segment, and do again the segments for which that fails.
    """

    warpgroups: int
    stages: int
    consumer_regs: int
    loader_regs: int
    overlap: bool
    fast: bool = True


def means_config(head_dim: int) -> MeansConfig:
    """The shape for a head size of up to 128: two accumulators of 64 x 128 leave room for two consumers only."""
    if padded(head_dim) == 128:
        return MeansConfig(warpgroups=2, stages=6, consumer_regs=240, loader_regs=24, overlap=True)
    return MeansConfig(warpgroups=3, stages=8, consumer_regs=160, loader_regs=24, overlap=False)


def aot_specs(kernel: Any) -> list[AotSpec]:
    """List the configurations of ``kernel`` that stand for all that users meet."""
    cases = [("fast", 128, 64, "bf16"), ("retry", 128, 64, "bf16"), ("careful", 128, 128, "fp16")]
    cases += [("fast", 64, 64, "bf16"), ("retry", 64, 128, "bf16")]
    return [_spec(kernel, *case) for case in cases]


def _spec(kernel: Any, label: str, dim: int, block_k: int, dtype: str) -> AotSpec:
    d, config = padded(dim), means_config(dim)
    values = {
        "D": d,
        "BLOCK_K": block_k,
        "WARPGROUPS": config.warpgroups,
        "STAGES": config.stages,
        "CONSUMER_REGS": config.consumer_regs,
        "LOADER_REGS": config.loader_regs,
        "FAST": label == "fast",
        "OVERLAP": label == "fast" and config.overlap,
        "RETRY": label == "retry",
    }
    types = dict.fromkeys(("desc_q", "desc_k", "desc_v"), f"tensordesc<{dtype}[1, 1, 64, {d}],{tile_layout()}>")
    types |= {"bits": "*i32", "sums": "*fp32", "accs": "*fp32", "flags": "*i32", "scale2": "fp32"}
    signature = {name: "constexpr" if name in values else types.get(name, "i32") for name in kernel.arg_names}
    return AotSpec(
        name=f"query_means_hopper/{label}/d{dim}/k{block_k}/{dtype}",
        fn=kernel,
        signature=signature,
        constexprs=values,
        options={"num_warps": 4},
        targets=("sm_90",),
        max_spill_bytes=0 if d == 128 else 160,  # kept over the loops; those spill nothing
        gluon=True,
        divisible_by_16=("bits", "sums", "accs"),
    )
