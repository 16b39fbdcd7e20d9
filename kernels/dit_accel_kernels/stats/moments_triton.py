"""Block moments in Triton: tokens are gathered, nothing is permuted first."""

# Kernels have no types.
# mypy: disallow_untyped_defs=False, disallow_incomplete_defs=False
# mypy: disallow_untyped_decorators=False, disallow_untyped_calls=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..aot_spec import AotSpec

__all__ = ["AOT_SPECS", "block_moments_triton"]

_ELEMENTS = 8192  # of a tile that is held in registers


@triton.jit
def _tile(
    base, p_table, p_valid, i_row, part, tokens, stride_s, channel,
    BLOCK: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, HAS_ORDER: tl.constexpr, HAS_VALID: tl.constexpr,
):  # fmt: skip
    """Some tokens of a block, 0 where they do not count, and which of them do."""
    within = part + tl.arange(0, ROWS)
    position = i_row * BLOCK + within
    counts = (within < BLOCK) & (position < tokens)
    token = position
    if HAS_ORDER:
        token = tl.load(p_table + position, mask=counts, other=0)
    if HAS_VALID:
        counts = counts & (tl.load(p_valid + position, mask=counts, other=0) != 0)
    # [ROWS, WIDTH]
    p_x = base + token.to(tl.int64)[:, None] * stride_s + channel[None, :]
    return tl.load(p_x, mask=counts[:, None] & (channel[None, :] < DIM), other=0.0).to(tl.float32), counts


# Counts are not specialised: another number of tokens must not compile another kernel.
@triton.jit(do_not_specialize=["tokens", "count"])
def block_moments_kernel(
    X, TABLE, HEAD, BLOCKS, VALID, MEAN, VARIANCE, SIZE, tokens, count, stride_b, stride_h, stride_s,
    BLOCK: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, HAS_ORDER: tl.constexpr,
    HAS_VALID: tl.constexpr,
):  # fmt: skip
    """One program: one block of one head. A block of more than ROWS tokens is read twice, the second time from a cache."""
    i_entry, i_h, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, WIDTH)
    base = X + i_b * stride_b + i_h * stride_h
    i_row = tl.load(BLOCKS + i_entry)
    p_table, p_valid = TABLE, VALID + i_b * tokens
    if HAS_ORDER:
        p_table += tl.load(HEAD + i_h).to(tl.int64) * tokens
    b_x, counts = _tile(
        base, p_table, p_valid, i_row, 0, tokens, stride_s, channel, BLOCK, DIM, ROWS, HAS_ORDER, HAS_VALID
    )
    b_sum, b_size = tl.sum(b_x, 0), tl.sum(counts.to(tl.float32), 0)
    for part in range(ROWS, BLOCK, ROWS):
        b_more, more = _tile(
            base, p_table, p_valid, i_row, part, tokens, stride_s, channel, BLOCK, DIM, ROWS, HAS_ORDER, HAS_VALID
        )
        b_sum += tl.sum(b_more, 0)
        b_size += tl.sum(more.to(tl.float32), 0)
    b_count = tl.maximum(b_size, 1.0)
    b_mean = b_sum / b_count
    b_off = tl.where(counts[:, None], b_x - b_mean[None, :], 0.0)
    b_square = tl.sum(b_off * b_off, 0)
    for part in range(ROWS, BLOCK, ROWS):
        b_more, more = _tile(
            base, p_table, p_valid, i_row, part, tokens, stride_s, channel, BLOCK, DIM, ROWS, HAS_ORDER, HAS_VALID
        )
        b_off = tl.where(more[:, None], b_more - b_mean[None, :], 0.0)
        b_square += tl.sum(b_off * b_off, 0)
    offset = ((i_b * tl.num_programs(1) + i_h) * count + i_entry) * DIM + channel
    tl.store(MEAN + offset, b_mean, mask=channel < DIM)
    tl.store(VARIANCE + offset, b_square / b_count, mask=channel < DIM)
    if i_h == 0:
        tl.store(SIZE + i_b * count + i_entry, b_size)


def _shape(block: int, width: int) -> tuple[int, int]:
    """Tokens that a program holds at once, and its warps: few with many loads each are fastest where a block fits."""
    rows = min(_ELEMENTS // width, triton.next_power_of_2(block))
    return rows, 2 if block <= rows else 4


def block_moments_triton(
    x: Tensor, block: int, table: Tensor | None, head: Tensor | None, rows: Tensor, key_valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and size of the blocks ``rows``; see :func:`dit_accel_kernels.stats.block_moments`."""
    batch, heads, tokens, dim = x.shape
    count, width = rows.shape[0], triton.next_power_of_2(dim)
    mean, variance = (torch.empty(batch, heads, count, dim, dtype=torch.float32, device=x.device) for _ in range(2))
    size = torch.empty(batch, count, dtype=torch.float32, device=x.device)
    ordered = table is not None and head is not None
    rows_at_once, warps = _shape(block, width)
    with torch.cuda.device_of(x):
        block_moments_kernel[(count, heads, batch)](
            x, x if table is None else table.contiguous(), x if head is None else head.contiguous(),
            rows.to(torch.int32).contiguous(), x if key_valid is None else key_valid.contiguous().view(torch.uint8),
            mean, variance, size, tokens, count, *x.stride()[:3],
            BLOCK=block, DIM=dim, WIDTH=width, ROWS=rows_at_once, HAS_ORDER=ordered, HAS_VALID=key_valid is not None,
            num_warps=warps,
        )  # fmt: skip
    return mean, variance, size[:1] if key_valid is None else size


def _spec(dim: int, dtype: str, block: int, features: bool) -> AotSpec:
    width = triton.next_power_of_2(dim)
    rows, warps = _shape(block, width)
    constants = {"BLOCK": block, "DIM": dim, "WIDTH": width, "ROWS": rows}
    constants |= {"HAS_ORDER": features, "HAS_VALID": features}
    types = {"X": f"*{dtype}", "TABLE": "*i32", "HEAD": "*i32", "BLOCKS": "*i32", "VALID": "*u8"}
    types |= dict.fromkeys(("MEAN", "VARIANCE", "SIZE"), "*fp32")
    names = block_moments_kernel.arg_names
    return AotSpec(
        name=f"block_moments/d{dim}/{dtype}/{block}{'/order+valid' if features else ''}",
        fn=block_moments_kernel,
        signature={name: "constexpr" if name in constants else types.get(name, "i32") for name in names},
        constexprs=constants,
        options={"num_warps": warps},
        divisible_by_16=("X", "MEAN", "VARIANCE", "stride_b", "stride_h", "stride_s"),
    )


AOT_SPECS = [_spec(128, "bf16", 128, False), _spec(128, "bf16", 64, True), _spec(72, "fp32", 256, True)]
