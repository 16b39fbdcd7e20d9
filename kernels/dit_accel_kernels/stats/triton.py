"""Block statistics in Triton: every token is read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common import blocks, next_power_of_2
from .._launch import launch
from ..aot_spec import AotSpec

__all__ = ["AOT_SPECS", "block_stats_triton", "valid_counts"]


# Counts are not specialised: another number of tokens must not compile another kernel.
@triton.jit(do_not_specialize=["tokens", "count", "stride_valid"])
def block_stats_kernel(
    X, VALID, MEAN, ABSMAX, tokens, count,
    stride_b, stride_h, stride_s, stride_valid,
    BLOCK: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, HAS_VALID: tl.constexpr,
):  # fmt: skip
    """One program: one block of one head, ROWS tokens at a time."""
    i_block, i_h, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, WIDTH)
    base = X + i_b * stride_b + i_h * stride_h
    b_sum = tl.zeros([WIDTH], tl.float32)
    b_max = tl.zeros([WIDTH], tl.float32)
    b_count = tl.zeros([ROWS], tl.float32)
    for part in range(0, BLOCK, ROWS):
        within = part + tl.arange(0, ROWS)
        token = i_block * BLOCK + within
        valid = (within < BLOCK) & (token < tokens)
        if HAS_VALID:
            valid = valid & (tl.load(VALID + i_b * stride_valid + token, mask=valid, other=0) != 0)
        # [ROWS, WIDTH]
        p_x = base + token.to(tl.int64)[:, None] * stride_s + channel[None, :]
        b_x = tl.load(p_x, mask=valid[:, None] & (channel[None, :] < DIM), other=0.0).to(tl.float32)
        b_sum += tl.sum(b_x, 0)
        b_max = tl.maximum(b_max, tl.max(tl.abs(b_x), 0))
        b_count += valid.to(tl.float32)
    b_mean = b_sum / tl.maximum(tl.sum(b_count, 0), 1.0)
    offset = ((i_b * tl.num_programs(1) + i_h) * count + i_block) * DIM + channel
    tl.store(MEAN + offset, b_mean.to(MEAN.dtype.element_ty), mask=channel < DIM)
    tl.store(ABSMAX + offset, b_max, mask=channel < DIM)


def valid_counts(tokens: int, block: int, key_valid: Tensor | None, device: torch.device) -> Tensor:
    """int32 ``[B|1, Kb]`` valid tokens of each block; small enough for plain torch."""
    if key_valid is None:
        return _all_valid(tokens, block, device).clone()  # a compiler may reuse what an operator has returned
    count = blocks(tokens, block)
    padded = torch.nn.functional.pad(key_valid.to(torch.uint8), (0, count * block - tokens))
    return padded.view(-1, count, block).sum(2, dtype=torch.int32)


_counts: dict[tuple[int, int, torch.device], Tensor] = {}


def _all_valid(tokens: int, block: int, device: torch.device) -> Tensor:
    """Tokens of each block, int32 ``[1, Kb]``; kept, since four small operations in each call are felt."""
    known = _counts.get((tokens, block, device))
    if known is not None:
        return known
    with torch.inference_mode(False):
        first = torch.arange(blocks(tokens, block), device=device, dtype=torch.int32) * block
        made = (tokens - first).clamp(max=block)[None]
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return made  # its memory is the graph's, and nothing is in it yet
    if len(_counts) >= 16:
        _counts.clear()
    _counts[tokens, block, device] = made
    return made


def block_stats_triton(x: Tensor, block: int, key_valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, absolute maximum and count per block; see :func:`dit_accel_kernels.block_stats`."""
    batch, heads, tokens, dim = x.shape
    count = blocks(tokens, block)
    mean = torch.empty(batch, heads, count, dim, dtype=x.dtype, device=x.device)
    absmax = torch.empty(batch, heads, count, dim, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        launch(block_stats_kernel, (count, heads, batch))(
            x, x if key_valid is None else key_valid.contiguous().view(torch.uint8), mean, absmax, tokens, count,
            *x.stride()[:3], tokens,
            BLOCK=block, DIM=dim, WIDTH=next_power_of_2(dim), ROWS=min(32, next_power_of_2(block)),
            HAS_VALID=key_valid is not None, num_warps=4,
        )  # fmt: skip
    return mean, absmax, valid_counts(tokens, block, key_valid, x.device)


AOT_SPECS = [
    AotSpec(
        name=f"block_stats/d{dim}/{dtype}{'/valid' if valid else ''}",
        fn=block_stats_kernel,
        signature={"X": f"*{dtype}", "VALID": "*u8", "MEAN": f"*{dtype}", "ABSMAX": "*fp32"}
        | {name: "i32" for name in ("tokens", "count", "stride_b", "stride_h", "stride_s", "stride_valid")}
        | {name: "constexpr" for name in ("BLOCK", "DIM", "WIDTH", "ROWS", "HAS_VALID")},
        constexprs={"BLOCK": 64, "DIM": dim, "WIDTH": width, "ROWS": 32, "HAS_VALID": valid},
        options={"num_warps": 4},
        divisible_by_16=("X", "MEAN", "ABSMAX", "stride_b", "stride_h", "stride_s"),
    )
    for dim, width, dtype, valid in ((128, 128, "bf16", False), (72, 128, "fp32", True))
]
