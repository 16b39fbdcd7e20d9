"""Softmax mass of blocks from the map of means of runs in Triton, by two passes over the runs of keys."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._common import blocks
from ..._launch import capability, launch
from ...aot_spec import AotSpec
from .runs import Runs

__all__ = ["AOT_SPECS", "fine_mass_triton"]

_LOG2E = 1.4426950408889634


@triton.jit
def _logits(b_q, KEY, SIZE, start, scale2, WIDTH: tl.constexpr, BN: tl.constexpr):
    """Logits of BN runs of keys in units of log2, with the number of keys in each; ``-inf`` where there is none."""
    row = start + tl.arange(0, BN)
    b_k = tl.load(KEY + row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :])
    return tl.dot(b_q, b_k.T) * scale2 + tl.load(SIZE + row)[None, :]


# Counts are not specialised: another number of tokens must not compile another kernel.
@triton.jit(do_not_specialize=["queries", "q_rows", "k_rows", "q_blocks", "k_blocks"])
def fine_mass_kernel(
    QUERY, KEY, SIZE, OUT, queries, q_rows, k_rows, q_blocks, k_blocks, scale2,
    RUN: tl.constexpr, EACH_Q: tl.constexpr, EACH_K: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """One program: BM runs of queries of one head, which are BM // EACH_Q blocks."""
    i_map = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    b_q = tl.load(QUERY + (i_map * q_rows + row)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :])
    KEY += i_map * k_rows * WIDTH
    SIZE += i_map * k_rows
    top = tl.full([BM], float("-inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    for start in range(0, k_rows, BN):
        logits = _logits(b_q, KEY, SIZE, start, scale2, WIDTH, BN)
        new_top = tl.maximum(top, tl.max(logits, 1), propagate_nan=tl.PropagateNan.ALL)
        # With nothing to see so far both are -inf, and their difference would be NaN.
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        b_sum = b_sum * tl.exp2(top - safe) + tl.sum(tl.exp2(logits - safe[:, None]), 1)
        top = new_top
    # A run counts by its share of the queries of its block.
    here = tl.minimum(tl.maximum(queries - row * RUN, 0), RUN)
    whole = tl.minimum(queries - row // EACH_Q * (EACH_Q * RUN), EACH_Q * RUN)
    b_share = tl.log2(here.to(tl.float32)) - tl.log2(tl.maximum(whole, 1).to(tl.float32))
    b_shift = b_share - (top + tl.log2(b_sum))
    block = tl.program_id(0) * (BM // EACH_Q) + tl.arange(0, BM // EACH_Q)
    for start in range(0, k_rows, BN):
        logits = _logits(b_q, KEY, SIZE, start, scale2, WIDTH, BN)
        weights = tl.exp2(logits + b_shift[:, None])
        mass = tl.sum(tl.sum(tl.reshape(weights, BM // EACH_Q, EACH_Q, BN // EACH_K, EACH_K), 3), 1)
        col = start // EACH_K + tl.arange(0, BN // EACH_K)
        p_out = OUT + (i_map * q_blocks + block)[:, None] * k_blocks + col[None, :]
        tl.store(p_out, mass, mask=(block < q_blocks)[:, None] & (col < k_blocks)[None, :])


def _tile_of(dim: int, capability: int) -> tuple[dict[str, int], dict[str, int]]:
    """Constants and options of a launch; a capability of 0 is a GPU of AMD."""
    if not capability:
        return {"BM": 64, "BN": 32}, {"num_warps": 4, "num_stages": 1}
    if capability == 90:
        return {"BM": 64, "BN": 128}, {"num_warps": 4, "num_stages": 3}
    return {"BM": 64, "BN": 64}, {"num_warps": 4, "num_stages": 2}


def fine_mass_triton(
    runs: Runs, tokens: int, queries: int, keys: int, block_q: int, block_k: int, scale: float
) -> Tensor:
    """Mass of each block, float32 ``[B, H, Qb, Kb]``; rows sum to 1.

    Args:
        runs: means of runs of ``tokens`` queries and keys.
        tokens: tokens of a run.
        queries: number of queries.
        keys: number of keys.
        block_q: tokens in a query block.
        block_k: tokens in a key block.
        scale: factor of the logits.
    """
    batch, heads, q_rows, width = runs.query.shape
    q_blocks, k_blocks = blocks(queries, block_q), blocks(keys, block_k)
    out = runs.query.new_empty((batch, heads, q_blocks, k_blocks), dtype=torch.float32)
    tile, options = _tile_of(width, capability(out))
    launch(fine_mass_kernel, (blocks(blocks(queries, tokens), tile["BM"]), batch * heads))(
        runs.query, runs.key, runs.size, out, queries, q_rows, runs.key.shape[2], q_blocks, k_blocks, scale * _LOG2E,
        RUN=tokens, EACH_Q=block_q // tokens, EACH_K=block_k // tokens, WIDTH=width, **tile, **options,
    )  # fmt: skip
    return out


def _spec(dim: int, dtype: str, run: int, block: int, targets: tuple[str, ...], least: int) -> AotSpec:
    tile, options = _tile_of(dim, least)
    constants: dict[str, Any] = {"RUN": run, "EACH_Q": block // run, "EACH_K": block // run, "WIDTH": dim, **tile}
    types = dict.fromkeys(("QUERY", "KEY"), f"*{dtype}") | dict.fromkeys(("SIZE", "OUT", "scale2"), "*fp32")
    types["scale2"] = "fp32"
    names = fine_mass_kernel.arg_names
    return AotSpec(
        name=f"fine_spread_mass/d{dim}/{dtype}/{run}/{block}/{least or 'amd'}",
        fn=fine_mass_kernel,
        signature={name: "constexpr" if name in constants else types.get(name, "i32") for name in names},
        constexprs=constants,
        options=options,
        targets=targets,
        divisible_by_16=("QUERY", "KEY", "SIZE", "OUT"),
    )


AOT_SPECS = [
    _spec(dim, dtype, run, block, targets, least)
    for dim, dtype, run, block in ((128, "bf16", 8, 64), (64, "fp16", 4, 128))
    for targets, least in ((("sm_80", "sm_89", "sm_100"), 80), (("sm_90",), 90), (("gfx942",), 0))
]
