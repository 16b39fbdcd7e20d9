"""Levels of blocks to bits and lists in Triton: one launch counts, one writes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common import next_power_of_2
from .._launch import launch
from ..aot_spec import AotSpec

__all__ = ["AOT_SPECS", "compress_levels_triton"]

_SPAN = 1024


# Counts are not specialised: another number of blocks must not compile another kernel.
@triton.jit(do_not_specialize=["height", "width", "words", "q_len", "k_len"])
def count_kernel(
    LEVELS, BITS, FULL, PARTIAL, VISITED, SHARE, height, width, words, q_len, k_len,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """One program: one row of the map, as bits, as numbers of blocks and as its share of a head's map."""
    i_row = tl.program_id(0).to(tl.int64)
    full, partial, tokens = 0, 0, 0
    for start in range(0, width, SPAN):
        col = start + tl.arange(0, SPAN)
        level = tl.load(LEVELS + i_row * width + col, mask=col < width, other=0)
        kept = level != 0
        full += tl.sum((level == 1).to(tl.int32), 0)
        partial += tl.sum((level == 255).to(tl.int32), 0)
        tokens += tl.sum(tl.where(kept, tl.minimum(k_len - col * BLOCK_K, BLOCK_K), 0), 0)
        b_bits = tl.reshape(kept.to(tl.int32), SPAN // 32, 32) << tl.arange(0, 32)[None, :]
        word = start // 32 + tl.arange(0, SPAN // 32)
        tl.store(BITS + i_row * words + word, tl.sum(b_bits, 1), mask=word < words)
    tl.store(FULL + i_row, full)
    tl.store(PARTIAL + i_row, partial)
    tl.store(VISITED + i_row, full + partial)
    size = tl.minimum(q_len - tl.program_id(0) % height * BLOCK_Q, BLOCK_Q)
    tl.store(SHARE + i_row, (tl.cast(tokens, tl.float32) / k_len) * (tl.cast(size, tl.float32) / q_len))


@triton.jit(do_not_specialize=["width", "size"])
def write_kernel(
    LEVELS, UPTO, START, FULL, PARTIAL, INDICES, width, size, SPAN: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One program: the blocks of one row, whole ones first, each kind in order. UPTO counts the blocks up to its end."""
    i_row = tl.program_id(0).to(tl.int64)
    full, partial = tl.load(FULL + i_row), tl.load(PARTIAL + i_row)
    if PACKED:
        begin = tl.minimum(tl.load(UPTO + i_row) - full - partial, size)
        full = tl.minimum(full, size - begin)
        partial = tl.minimum(partial, size - begin - full)
        tl.store(FULL + i_row, full)
        tl.store(PARTIAL + i_row, partial)
    else:
        begin = (i_row * width).to(tl.int32)
    tl.store(START + i_row, begin)
    INDICES += begin
    at_full, at_partial = 0, full
    for start in range(0, width, SPAN):
        col = start + tl.arange(0, SPAN)
        level = tl.load(LEVELS + i_row * width + col, mask=col < width, other=0)
        is_full, is_partial = (level == 1).to(tl.int32), (level == 255).to(tl.int32)
        place = at_full + tl.cumsum(is_full, 0) - 1
        tl.store(INDICES + place, col, mask=(is_full != 0) & (place < full))
        place = at_partial + tl.cumsum(is_partial, 0) - 1
        tl.store(INDICES + place, col, mask=(is_partial != 0) & (place < full + partial))
        at_full += tl.sum(is_full, 0)
        at_partial += tl.sum(is_partial, 0)


def compress_levels_triton(
    levels: Tensor, q_len: int, k_len: int, block_q: int, block_k: int, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`dit_accel_kernels.compress.compress_levels`; contiguous levels, a capacity below 0 is none."""
    rows, (height, width) = levels.shape[:3], levels.shape[2:]
    words, number = -(-width // 32), rows.numel()
    size = capacity if capacity >= 0 else number * width
    bits = torch.empty((*rows, words), dtype=torch.int32, device=levels.device)
    start, full, partial, visited = torch.empty((4, *rows), dtype=torch.int32, device=levels.device)
    indices = torch.zeros(size, dtype=torch.int32, device=levels.device)
    share = torch.empty(rows, dtype=torch.float32, device=levels.device)
    span, options = min(max(32, next_power_of_2(width)), _SPAN), {"num_warps": 4}
    with torch.cuda.device_of(levels):
        launch(count_kernel, (number,))(
            levels, bits, full, partial, visited, share, height, width, words, q_len, k_len,
            BLOCK_Q=block_q, BLOCK_K=block_k, SPAN=span, **options,
        )  # fmt: skip
        upto = visited.view(-1).cumsum(0, dtype=torch.int32) if capacity >= 0 else visited
        launch(write_kernel, (number,))(
            levels, upto, start, full, partial, indices, width, size, SPAN=span, PACKED=capacity >= 0, **options
        )
    return bits, start, full, partial, indices, share.sum(-1)


def _spec(fn: object, name: str, constants: dict[str, int | bool]) -> AotSpec:
    types = {"LEVELS": "*u8", "SHARE": "*fp32"}
    types |= dict.fromkeys(("BITS", "FULL", "PARTIAL", "VISITED", "UPTO", "START", "INDICES"), "*i32")
    names = fn.arg_names  # type: ignore[attr-defined]
    return AotSpec(
        name=name,
        fn=fn,
        signature={n: "constexpr" if n in constants else types.get(n, "i32") for n in names},
        constexprs=constants,
        options={"num_warps": 4},
        divisible_by_16=("LEVELS",),
    )


AOT_SPECS = [
    _spec(count_kernel, "count_levels/1024", {"BLOCK_Q": 128, "BLOCK_K": 64, "SPAN": 1024}),
    _spec(write_kernel, "write_lists/1024", {"SPAN": 1024, "PACKED": True}),
]
