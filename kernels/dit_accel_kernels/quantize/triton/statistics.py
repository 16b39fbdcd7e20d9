"""What the quantiser must know of a head before it makes codes: the mean key, and how large the values of a channel are.

Both come from a sample (:mod:`dit_accel_kernels.quantize.sample`) that a program of the first launch for each head looks
through, or some in parts where INT8 values need all of them: who makes codes puts the parts together. No atomics, and no
order of programs that could change a bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .elements import LARGEST, read, seen_at

__all__ = ["channel_tops", "key_mean", "key_sums", "value_tops", "wait_for_others"]


@triton.jit
def wait_for_others(PDL: tl.constexpr):
    """Wait for the kernel before, and let the one behind start: it waits in turn for the end of this one."""
    if PDL:
        tl.inline_asm_elementwise(
            "griddepcontrol.wait; griddepcontrol.launch_dependents; mov.u32 $0, 0;", "=r", [], dtype=tl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def key_sums(
    k, sums, i_part, head, table, head_row, valid, i_b, i_h, tokens, samples, step, stride_b, stride_h, stride_s,
    DIM: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, HAS_ORDER: tl.constexpr,
    HAS_VALID: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """The sum of one part of the sampled keys, made in float64."""
    size = tl.cdiv(samples, PARTS)
    b_sum = tl.zeros([ROWS, WIDTH], tl.float64)
    for start in range(i_part * size, tl.minimum((i_part + 1) * size, samples), 8 * ROWS):
        for i in tl.static_range(8):
            sample = start + i * ROWS + tl.arange(0, ROWS)
            position = sample * step
            seen = (sample < (i_part + 1) * size) & seen_at(position, tokens, valid, i_b, HAS_VALID)
            b_k = read(
                k, position, seen, table, head_row, i_b, i_h, tokens, stride_b, stride_h, stride_s,
                DIM, WIDTH, HAS_ORDER, True, True, ASM,
            )  # fmt: skip
            b_sum += b_k.to(tl.float64)
    tl.store(sums + (head * PARTS + i_part) * WIDTH + tl.arange(0, WIDTH), tl.sum(b_sum, 0).to(tl.float32))


@triton.jit
def key_mean(sums, divisors, head, i_b, samples, WIDTH: tl.constexpr, PARTS: tl.constexpr, HAS_VALID: tl.constexpr):
    """The mean of the sampled keys."""
    channel = tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.float32)
    for i in tl.static_range(PARTS):
        total += tl.load(sums + (head * PARTS + i) * WIDTH + channel)
    divisor = tl.load(divisors + i_b) if HAS_VALID else samples.to(tl.float32)
    return total * tl.div_rn(divisor * 0.0 + 1.0, divisor)


@triton.jit
def value_tops(
    v, tops, again, i_part, head, table, head_row, valid, i_b, i_h, tokens, samples, step, stride_b, stride_h, stride_s,
    DIM: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, HAS_ORDER: tl.constexpr,
    HAS_VALID: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """The largest magnitudes of the channels in one part of the sampled values; clears what is noted of larger ones."""
    size = tl.cdiv(samples, PARTS)
    top = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(i_part * size, tl.minimum((i_part + 1) * size, samples), 8 * ROWS):
        for i in tl.static_range(8):
            sample = start + i * ROWS + tl.arange(0, ROWS)
            position = sample * step
            seen = (sample < (i_part + 1) * size) & seen_at(position, tokens, valid, i_b, HAS_VALID)
            b_v = read(
                v, position, seen, table, head_row, i_b, i_h, tokens, stride_b, stride_h, stride_s,
                DIM, WIDTH, HAS_ORDER, True, True, ASM,
            )  # fmt: skip
            top = tl.maximum(top, tl.abs(b_v))
    channel = tl.arange(0, WIDTH)
    tl.store(tops + (head * PARTS + i_part) * WIDTH + channel, tl.max(top, 0))
    # One more number than channels: whether anything was above them.
    tl.store(again + head * (WIDTH + 8) + channel, tl.zeros([WIDTH], tl.float32), mask=i_part + channel * 0 == 0)
    tl.store(again + head * (WIDTH + 8) + WIDTH, 0.0, mask=i_part == 0)


@triton.jit
def channel_tops(tops, head, headroom, least, WIDTH: tl.constexpr, PARTS: tl.constexpr):
    """What the values of each channel are taken not to exceed: ``headroom`` times the largest of the sample."""
    channel = tl.arange(0, WIDTH)
    if PARTS > 4:
        part = head * PARTS + tl.arange(0, PARTS)
        top = tl.max(tl.load(tops + part[:, None] * WIDTH + channel[None, :]), 0)
    else:
        top = tl.zeros([WIDTH], tl.float32)
        for i in tl.static_range(PARTS):
            top = tl.maximum(top, tl.load(tops + (head * PARTS + i) * WIDTH + channel))
    return tl.minimum(tl.maximum(top * headroom, least), LARGEST)
