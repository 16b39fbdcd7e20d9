"""The pyramid in Triton: every token is read once, for all levels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common import blocks
from .._launch import launch
from ..aot_spec import AotSpec
from ..stats.triton import valid_counts

__all__ = ["AOT_SPECS", "pyramid_rows_triton", "pyramid_triton"]

_TOKENS = 32
_BLOCKS_OF_A_ROW = 1024


@triton.jit
def _store_level(
    b_x, b_n, p_out, i_r, channel, padded,
    LEVEL: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Means of the runs of LEVEL rows of a tile ``[ROWS, WIDTH]``, of which ``b_n`` marks those that count."""
    RUNS: tl.constexpr = ROWS // LEVEL
    b_sum = tl.sum(tl.reshape(b_x, RUNS, LEVEL, WIDTH), 1)
    b_all = tl.sum(tl.reshape(b_n, RUNS, LEVEL), 1)
    b_mean = (b_sum / tl.maximum(b_all, 1.0)[:, None]).to(p_out.dtype.element_ty)
    run = i_r * RUNS + tl.arange(0, RUNS)
    mask = (run < padded // LEVEL)[:, None] & (channel[None, :] < DIM)
    tl.store(p_out + run.to(tl.int64)[:, None] * DIM + channel[None, :], b_mean, mask=mask)


# Counts are not specialised: another number of tokens must not compile another kernel.
@triton.jit(do_not_specialize=["tokens", "padded", "extra", "stride_valid"])
def pyramid_kernel(
    X, VALID, OUT, tokens, padded, extra, stride_b, stride_h, stride_s, stride_valid,
    LEVELS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, HAS_VALID: tl.constexpr,
):  # fmt: skip
    """One program: ROWS tokens of one head, a multiple of every level; ``padded`` counts the tokens of whole blocks."""
    i_r, i_h, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, WIDTH)
    token = i_r * ROWS + tl.arange(0, ROWS)
    valid = token < tokens
    if HAS_VALID:
        valid = valid & (tl.load(VALID + i_b * stride_valid + token, mask=valid, other=0) != 0)
    # [ROWS, WIDTH]
    p_x = X + i_b * stride_b + i_h * stride_h + token.to(tl.int64)[:, None] * stride_s + channel[None, :]
    b_x = tl.load(p_x, mask=valid[:, None] & (channel[None, :] < DIM), other=0.0).to(tl.float32)
    b_n = valid.to(tl.float32)
    p_out = OUT + (i_b * tl.num_programs(1) + i_h) * extra * DIM
    first = tokens * 0
    for i in tl.static_range(len(LEVELS)):
        _store_level(b_x, b_n, p_out + first.to(tl.int64) * DIM, i_r, channel, padded, LEVELS[i], DIM, WIDTH, ROWS)
        first += padded // LEVELS[i]


def pyramid_triton(
    k: Tensor, v: Tensor, levels: list[int], block: int, key_valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and bias of all levels; see :func:`dit_accel_kernels.pyramid`."""
    batch, heads, tokens, dim = k.shape
    padded = blocks(tokens, block) * block
    extra = sum(padded // level for level in levels)
    out = []
    with torch.cuda.device_of(k):
        for x in (k, v):
            pooled = torch.empty(batch, heads, extra, dim, dtype=x.dtype, device=x.device)
            rows = max(_TOKENS, *levels)
            launch(pyramid_kernel, (blocks(padded, rows), heads, batch))(
                x, x if key_valid is None else key_valid.contiguous().view(torch.uint8), pooled,
                tokens, padded, extra, *x.stride()[:3], tokens,
                LEVELS=tuple(levels), DIM=dim, WIDTH=triton.next_power_of_2(dim), ROWS=rows,
                HAS_VALID=key_valid is not None, num_warps=4,
            )  # fmt: skip
            out.append(pooled)
    # Small enough for plain torch: one number for each key.
    count = torch.cat([_counts(tokens, padded, level, key_valid, k.device) for level in levels], 1)
    return out[0], out[1], count[:, None].float().log()


def _counts(tokens: int, padded: int, level: int, key_valid: Tensor | None, device: torch.device) -> Tensor:
    count = valid_counts(tokens, level, key_valid, device)
    return torch.nn.functional.pad(count, (0, padded // level - count.shape[1]))


@triton.jit
def _store_groups(p_map, p_out, count, first, kb, LEVEL: tl.constexpr, EACH: tl.constexpr, BLOCK: tl.constexpr):
    """Append the EACH groups of every block of a level behind the ``count`` that there are; ``first`` is the level's."""
    for start in range(0, kb, BLOCK):
        block = start + tl.arange(0, BLOCK)
        chosen = tl.load(p_map + block, mask=block < kb, other=0) == LEVEL
        n = chosen.to(tl.int32)
        at = count + (tl.cumsum(n, 0) - n) * EACH
        for j in tl.static_range(EACH):
            tl.store(p_out + at + j, first + block * EACH + j, mask=chosen)
        count += tl.sum(n, 0) * EACH
    return count


@triton.jit(do_not_specialize=["kb", "capacity"])
def pyramid_rows_kernel(
    LEVEL_MAP, COUNT, INDICES, kb, capacity, LEVELS: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr
):
    """One program: the groups of one row of a map, level by level, and their number."""
    i_row = tl.program_id(0).to(tl.int64)
    p_map, p_out = LEVEL_MAP + i_row * kb, INDICES + i_row * capacity
    count, first = kb * 0, kb * 0
    for i in tl.static_range(len(LEVELS)):
        count = _store_groups(p_map, p_out, count, first, kb, LEVELS[i], TOP // LEVELS[i], BLOCK)
        first += kb * (TOP // LEVELS[i])
    tl.store(COUNT + i_row, count)


def pyramid_rows_triton(level_map: Tensor, levels: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of groups; see :func:`dit_accel_kernels.pyramid.pyramid_rows`."""
    kb, top = level_map.shape[3], max(levels)
    capacity = kb * (top // min(levels))
    count = torch.empty(level_map.shape[:3], dtype=torch.int32, device=level_map.device)
    indices = torch.empty(count.numel() * capacity, dtype=torch.int32, device=level_map.device)
    with torch.cuda.device_of(level_map):
        launch(pyramid_rows_kernel, (count.numel(),))(
            level_map.contiguous(), count, indices, kb, capacity,
            LEVELS=tuple(levels), TOP=top, BLOCK=_BLOCKS_OF_A_ROW, num_warps=4,
        )  # fmt: skip
    start = torch.arange(count.numel(), dtype=torch.int32, device=level_map.device).mul_(capacity)
    return start.view(count.shape), count, indices


AOT_SPECS = [
    AotSpec(
        name="pyramid/rows",
        fn=pyramid_rows_kernel,
        signature={"LEVEL_MAP": "*u8", "COUNT": "*i32", "INDICES": "*i32", "kb": "i32", "capacity": "i32"}
        | dict.fromkeys(("LEVELS", "TOP", "BLOCK"), "constexpr"),
        constexprs={"LEVELS": (2, 4, 8), "TOP": 8, "BLOCK": _BLOCKS_OF_A_ROW},
        options={"num_warps": 4},
        divisible_by_16=("LEVEL_MAP", "COUNT", "INDICES"),
    ),
]
AOT_SPECS += [
    AotSpec(
        name=f"pyramid/d{dim}/{dtype}{'/valid' if valid else ''}",
        fn=pyramid_kernel,
        signature={"X": f"*{dtype}", "VALID": "*u8", "OUT": f"*{dtype}"}
        | {n: "i32" for n in ("tokens", "padded", "extra", "stride_b", "stride_h", "stride_s", "stride_valid")}
        | {name: "constexpr" for name in ("LEVELS", "DIM", "WIDTH", "ROWS", "HAS_VALID")},
        constexprs={"LEVELS": levels, "DIM": dim, "WIDTH": width, "ROWS": max(32, *levels), "HAS_VALID": valid},
        options={"num_warps": 4},
        divisible_by_16=("X", "OUT", "stride_b", "stride_h", "stride_s"),
    )
    for dim, width, dtype, valid, levels in (
        (128, 128, "bf16", False, (2, 4, 8)),
        (72, 128, "fp32", True, (2, 4, 8, 16)),
        (256, 256, "bf16", False, (8, 64)),
    )
]
