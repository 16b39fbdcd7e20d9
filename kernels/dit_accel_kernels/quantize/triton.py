"""The quantiser in Triton: every token is read once for its statistics where they are needed, and once for its codes.

The bits are those of the reference. The kernels are compiled without fusing products and sums into multiply-adds, because
a fused one rounds once where the reference rounds twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .specs import aot_specs

__all__ = ["AOT_SPECS", "key_stats_kernel", "quantize_rows_kernel", "quantize_values_kernel"]


@triton.jit
def _finite(x):
    # Comparisons with NaN are false.
    return tl.where(tl.abs(x) <= 3.4028234663852886e38, x, 0.0)


@triton.jit
def _tokens(table, head_row, position, inside, i_h, tokens, HAS_ORDER: tl.constexpr):
    """Natural places of the positions of block order, int64."""
    if HAS_ORDER:
        table += tl.load(head_row + i_h).to(tl.int64) * tokens
        return tl.load(table + position, mask=inside, other=0).to(tl.int64)
    return position.to(tl.int64)


@triton.jit
def _hadamard(x, ROWS: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr):
    """The fast transform of runs of ``2 ** STEPS`` columns, without its factor."""
    for i in tl.static_range(STEPS):
        pairs = x.reshape(ROWS, WIDTH // (2 << i), 2, 1 << i).permute(0, 1, 3, 2)
        a, b = tl.split(pairs)
        x = tl.join(a + b, a - b).permute(0, 1, 3, 2).reshape(ROWS, WIDTH)
    return x


@triton.jit
def _rounded(y, LIMIT: tl.constexpr):
    """To the nearest integer, ties to even: adding 1.5 * 2 ** 23 leaves no bits behind the point."""
    y = (y + 12582912.0) - 12582912.0
    return tl.minimum(tl.maximum(y, -LIMIT), LIMIT).to(tl.int8)


@triton.jit
def _store_codes(out, row, y, mask, ROWS: tl.constexpr, WIDTH: tl.constexpr, KIND: tl.constexpr, LIMIT: tl.constexpr):
    """Store scaled ``y [ROWS, WIDTH]`` as codes in rows ``row``; ``mask`` marks the rows there are."""
    if KIND == "int4":
        HALF: tl.constexpr = WIDTH // 2
        low, high = tl.split(_rounded(y, LIMIT).reshape(ROWS, 2, HALF).permute(0, 2, 1))
        codes = ((low & 15) | (high << 4)).to(tl.uint8, bitcast=True)
        p_out = out + row[:, None] * HALF + tl.arange(0, HALF)[None, :]
    else:
        if KIND == "int8":
            codes = _rounded(y, LIMIT)
        else:
            codes = tl.minimum(tl.maximum(y, -LIMIT), LIMIT).to(tl.float8e4nv)
        p_out = out + row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(p_out, codes, mask=mask[:, None])


# What changes with the number of tokens alone must not compile another kernel.
@triton.jit(do_not_specialize=["tokens", "count"])
def quantize_rows_kernel(
    x, table, head_row, valid, mean, out, scale, tokens, count, stride_b, stride_h, stride_s,
    DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr,
    LIMIT: tl.constexpr, STEPS: tl.constexpr, NORM: tl.constexpr, PER_TOKEN: tl.constexpr, HAS_ORDER: tl.constexpr,
    HAS_VALID: tl.constexpr, HAS_MEAN: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK rows of queries (one scale each) or of keys (one scale for all)."""
    i_block, i_h, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    head = i_b * tl.num_programs(1) + i_h
    within = tl.arange(0, ROWS)
    position = i_block * BLOCK + within
    inside = (within < BLOCK) & (position < tokens)
    channel = tl.arange(0, WIDTH)
    token = _tokens(table, head_row, position, inside, i_h, tokens, HAS_ORDER)
    seen = inside
    if HAS_VALID:
        seen = seen & (tl.load(valid + i_b * tokens + position, mask=inside, other=0) != 0)
    # [ROWS, WIDTH]
    mask = seen[:, None] & (channel[None, :] < DIM)
    p_x = x + i_b * stride_b + i_h * stride_h + token[:, None] * stride_s + channel[None, :]
    b_x = tl.load(p_x, mask=mask, other=0.0).to(tl.float32)
    if HAS_MEAN:
        b_mean = tl.load(mean + head * DIM + channel, mask=channel < DIM, other=0.0)
        b_x = tl.where(mask, b_x - b_mean[None, :], 0.0)
    b_x = _finite(b_x)
    if STEPS > 0:
        b_x = _finite(_hadamard(b_x, ROWS, WIDTH, STEPS) * NORM)
    top = tl.max(tl.abs(b_x), 1)
    if not PER_TOKEN:
        top = tl.zeros([ROWS], tl.float32) + tl.max(top, 0)
    empty = top < 7.888609052210118e-31  # 2 ** -100
    inverse = tl.div_rn(tl.full([ROWS], 1.0, tl.float32), tl.where(empty, 1.0, top)) * LIMIT
    inverse = tl.where(empty, 0.0, inverse)
    b_scale = tl.where(empty, 1.0, top * (1.0 / LIMIT))
    _store_codes(out, head * tokens + position.to(tl.int64), b_x * inverse[:, None], inside, ROWS, WIDTH, KIND, LIMIT)
    if PER_TOKEN:
        tl.store(scale + head * tokens + position, b_scale, mask=inside)
    else:
        tl.store(scale + head * count + i_block + within * 0, b_scale, mask=within == 0)


@triton.jit(do_not_specialize=["tokens", "chunks"])
def key_stats_kernel(
    k, v, table, head_row, valid, sums, tops, tokens, chunks,
    k_b, k_h, k_s, v_b, v_h, v_s,
    DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, HAS_ORDER: tl.constexpr,
    HAS_VALID: tl.constexpr, HAS_SUMS: tl.constexpr, HAS_TOPS: tl.constexpr,
):  # fmt: skip
    """One program: the sum of CHUNK keys in float64 and the largest magnitude of as many values, for each channel."""
    i_chunk, i_h, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    head = i_b * tl.num_programs(1) + i_h
    channel = tl.arange(0, WIDTH)
    b_sum = tl.zeros([ROWS, WIDTH], tl.float64)
    b_top = tl.zeros([ROWS, WIDTH], tl.float32)
    for part in range(0, CHUNK, ROWS):
        position = i_chunk * CHUNK + part + tl.arange(0, ROWS)
        inside = position < tokens
        token = _tokens(table, head_row, position, inside, i_h, tokens, HAS_ORDER)
        if HAS_VALID:
            inside = inside & (tl.load(valid + i_b * tokens + position, mask=inside, other=0) != 0)
        # [ROWS, WIDTH]
        mask = inside[:, None] & (channel[None, :] < DIM)
        if HAS_SUMS:
            p_k = k + i_b * k_b + i_h * k_h + token[:, None] * k_s + channel[None, :]
            b_sum += _finite(tl.load(p_k, mask=mask, other=0.0).to(tl.float32)).to(tl.float64)
        if HAS_TOPS:
            p_v = v + i_b * v_b + i_h * v_h + token[:, None] * v_s + channel[None, :]
            b_top = tl.maximum(b_top, tl.abs(_finite(tl.load(p_v, mask=mask, other=0.0).to(tl.float32))))
    offset = (head * chunks + i_chunk) * WIDTH + channel
    if HAS_SUMS:
        tl.store(sums + offset, tl.sum(b_sum, 0))
    if HAS_TOPS:
        tl.store(tops + offset, tl.max(b_top, 0))


@triton.jit(do_not_specialize=["tokens", "columns"])
def quantize_values_kernel(
    v, table, head_row, valid, inverse, out, tokens, columns, stride_b, stride_h, stride_s,
    DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KIND: tl.constexpr, LIMIT: tl.constexpr,
    HAS_ORDER: tl.constexpr, HAS_VALID: tl.constexpr,
):  # fmt: skip
    """One program: ROWS places of the transposed values; places beyond the last key become 0."""
    i_rows, i_h, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    head = i_b * tl.num_programs(1) + i_h
    place = i_rows * ROWS + tl.arange(0, ROWS)
    # Place 4t + 2b + e holds key 8b + 2t + e of its 16.
    position = place // 16 * 16 + (place // 2) % 2 * 8 + (place // 4) % 4 * 2 + place % 2
    inside = position < tokens
    channel = tl.arange(0, WIDTH)
    token = _tokens(table, head_row, position, inside, i_h, tokens, HAS_ORDER)
    if HAS_VALID:
        inside = inside & (tl.load(valid + i_b * tokens + position, mask=inside, other=0) != 0)
    # [ROWS, WIDTH]
    mask = inside[:, None] & (channel[None, :] < DIM)
    p_v = v + i_b * stride_b + i_h * stride_h + token[:, None] * stride_s + channel[None, :]
    b_v = _finite(tl.load(p_v, mask=mask, other=0.0).to(tl.float32))
    b_v = b_v * tl.load(inverse + head * WIDTH + channel)[None, :]
    if KIND == "int8":
        codes = _rounded(b_v, LIMIT)
    else:
        codes = tl.minimum(tl.maximum(b_v, -LIMIT), LIMIT).to(tl.float8e4nv)
    p_out = out + (head * WIDTH + channel)[:, None] * columns.to(tl.int64) + place[None, :]
    tl.store(p_out, tl.trans(codes))


AOT_SPECS = aot_specs(quantize_rows_kernel, key_stats_kernel, quantize_values_kernel)
