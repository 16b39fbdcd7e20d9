"""Maximum and log-sum-exp of the logits of each key block in Triton: a product of which only reductions leave the chip."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common import blocks
from .._launch import launch
from ..aot_spec import ALL_TARGETS, AotSpec

__all__ = ["AOT_SPECS", "block_logits_triton"]

_LOG2E = 1.4426950408889634


# Counts are not specialised: another number of tokens must not compile another kernel.
@triton.jit(do_not_specialize=["count", "columns", "key_blocks", "heads", "seen_b", "seen_h"])
def block_logits_kernel(
    ROWS, COLS, SEEN, TOP, LSE, count, columns, key_blocks, heads, scale2, seen_b, seen_h,
    E: tl.constexpr, PER: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr,
    HAS_SEEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BM rows against BN columns of one head, BN // PER key blocks."""
    NB: tl.constexpr = BN // PER
    head = tl.program_id(2).to(tl.int64)
    i_h, i_b = head % heads, head // heads
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    o_n = tl.program_id(1) * BN + tl.arange(0, BN)
    o_e = tl.arange(0, BE)
    m_m, m_n = o_m < count, o_n < columns
    # [BM, BE] and [BN, BE]
    p_rows = ROWS + (head * count + o_m)[:, None] * E + o_e[None, :]
    p_cols = COLS + (head * columns + o_n)[:, None] * E + o_e[None, :]
    acc = tl.zeros([BM, BN], dtype=tl.float32)
    for start in range(0, E, BE):
        if E % BE == 0:
            b_rows = tl.load(p_rows + start, mask=m_m[:, None], other=0.0)
            b_cols = tl.load(p_cols + start, mask=m_n[:, None], other=0.0)
        else:
            m_e = start + o_e < E
            b_rows = tl.load(p_rows + start, mask=m_m[:, None] & m_e[None, :], other=0.0)
            b_cols = tl.load(p_cols + start, mask=m_n[:, None] & m_e[None, :], other=0.0)
        acc = tl.dot(b_rows, b_cols.T, acc, input_precision=PRECISION)
    visible = m_n
    if HAS_SEEN:
        visible = m_n & (tl.load(SEEN + i_b * seen_b + i_h * seen_h + o_n, mask=m_n, other=0) != 0)
    acc = tl.where(visible[None, :], acc * scale2, float("-inf"))
    top = acc
    lse = acc
    if PER > 1:
        cells = tl.reshape(acc, BM, NB, PER)
        top = tl.max(cells, 2)
        # With nothing to see both are -inf, and their difference is not 0 but NaN.
        safe = tl.where(top > float("-inf"), top, 0.0)
        lse = safe + tl.log2(tl.sum(tl.exp2(cells - safe[:, :, None]), 2))
    block = tl.program_id(1) * NB + tl.arange(0, NB)
    offset = (head * count + o_m)[:, None] * key_blocks + block[None, :]
    mask = m_m[:, None] & (block < key_blocks)[None, :]
    tl.store(TOP + offset, top * 0.6931471805599453, mask=mask)
    tl.store(LSE + offset, lse * 0.6931471805599453, mask=mask)


def _tile(per_block: int, size: int) -> tuple[dict[str, int], dict[str, int]]:
    """Constants and launch options for key blocks of ``per_block`` vectors of ``size`` bytes an element."""
    if size == 4:
        # Each operand is held twice, as its TF32 value and the remainder, so the tile must be small.
        return {"BM": 64, "BN": max(64, per_block), "BE": 32}, {"num_warps": 8, "num_stages": 2}
    # Unreduced tiles leave the chip whole: with 128 rows their addresses alone would fill the registers.
    return {"BM": 64 if per_block == 1 else 128, "BN": 128, "BE": 64}, {"num_warps": 8, "num_stages": 2}


def _precision(amd: bool) -> str:
    """How float32 is multiplied; AMD's compiler knows no split into TF32."""
    return "ieee" if amd else "tf32x3"


def block_logits_triton(
    rows: Tensor, cols: Tensor, per_block: int, scale: float, seen: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Maximum and log-sum-exp per key block; see :func:`.reduce.block_logits`, ``per_block`` a power of two up to 128."""
    batch, heads, count, width = rows.shape
    columns = cols.shape[2]
    key_blocks = columns // per_block
    top, lse = (torch.empty(batch, heads, count, key_blocks, dtype=torch.float32, device=rows.device) for _ in "ml")
    tile, options = _tile(per_block, rows.element_size())
    flags = rows if seen is None else seen.contiguous().view(torch.uint8)
    steps = (0, 0) if seen is None else tuple(s if n > 1 else 0 for n, s in zip(seen.shape, seen.contiguous().stride()))
    grid = (blocks(count, tile["BM"]), blocks(columns, tile["BN"]), batch * heads)
    with torch.cuda.device_of(rows):
        launch(block_logits_kernel, grid)(
            rows.contiguous(), cols.contiguous(), flags, top, lse,
            count, columns, key_blocks, heads, scale * _LOG2E, *steps[:2],
            E=width, PER=per_block, HAS_SEEN=seen is not None, PRECISION=_precision(torch.version.hip is not None),
            **tile, **options,
        )  # fmt: skip
    return top, lse


def _spec(label: str, width: int, per_block: int, dtype: str, targets: tuple[str, ...]) -> AotSpec:
    tile, options = _tile(per_block, 4 if dtype == "fp32" else 2)
    shape: dict[str, Any] = {"E": width, "PER": per_block, **tile, "HAS_SEEN": label != "whole"}
    shape["PRECISION"] = _precision(targets == ("gfx942",))
    signature = {"ROWS": f"*{dtype}", "COLS": f"*{dtype}", "SEEN": "*u8", "TOP": "*fp32", "LSE": "*fp32"}
    signature |= {name: "i32" for name in ("count", "columns", "key_blocks", "heads")}
    signature |= {"scale2": "fp32", "seen_b": "i32", "seen_h": "i32"}
    return AotSpec(
        name=f"block_logits/{label}/e{width}/per{per_block}/{dtype}{'/amd' if targets == ('gfx942',) else ''}",
        fn=block_logits_kernel,
        signature=signature | dict.fromkeys(shape, "constexpr"),
        constexprs=shape,
        options=options,
        targets=targets,
        max_spill_bytes=256 if dtype == "fp32" else 0,
        divisible_by_16=("ROWS", "COLS", "TOP", "LSE"),
    )


AOT_SPECS = [
    _spec(label, width, per_block, dtype, targets)
    for label, width, per_block, dtype in (
        ("whole", 8 * 128, 16, "bf16"),  # antidiagonals, stride 8
        ("masked", 16 * 72, 8, "fp16"),  # antidiagonals, stride 16
        ("masked", 128, 32, "bf16"),  # samples
        ("masked", 72, 4, "fp32"),  # sub-blocks
        ("masked", 64, 2, "bf16"),  # sub-blocks, two of a block
        ("masked", 64, 1, "bf16"),  # means of whole blocks
    )
    for targets in (tuple(t for t in ALL_TARGETS if t.startswith("sm_")), ("gfx942",))
]
