"""The quantiser in Triton: two launches, each token is read once for its statistics and once for its codes.

Before the codes of a head's keys can be made its mean key must be known, and before those of its values the largest of each
channel. The first launch makes these, beside the codes of the queries, which need neither: who is the last of a head to add
what it knows writes down what is left of it. The second launch makes the codes of keys and values, last heads first: what
was read last is still in the L2 cache. (One launch in which codes wait for the statistics of their head, so that all of
them could be read from the cache, took 1.8 to 4 times as long: programs that wait take the place of programs that read.)

The bits are those of the reference. The kernels are compiled without fusing products and sums into multiply-adds, because
a fused one rounds once where the reference rounds twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..specs import aot_specs
from .elements import LARGEST, finite, hadamard, inverse_of, read, seen_at, store_codes, word_of

__all__ = ["AOT_SPECS", "clear_kernel", "keys_kernel", "queries_kernel"]


@triton.jit
def clear_kernel(x, count, BLOCK: tl.constexpr):
    """Write zeros, BLOCK numbers a program."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + at, tl.zeros([BLOCK], tl.int64), mask=at < count)


@triton.jit
def _last(flag, count):
    """Say that this program has added what it knows; whether all ``count`` of its head have."""
    tl.debug_barrier()
    return tl.atomic_add(flag, 1, sem="acq_rel") == count - 1


@triton.jit
def _row_codes(
    x, position, inside, seen, mean, out, scale, head, place, table, head_row, i_b, i_h, tokens,
    stride_b, stride_h, stride_s,
    DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KIND: tl.constexpr, LIMIT: tl.constexpr,
    STEPS: tl.constexpr, NORM: tl.constexpr, PER_TOKEN: tl.constexpr, HAS_ORDER: tl.constexpr, HAS_MEAN: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Codes of ROWS queries (one scale each) or of a block of keys (one scale for all, at ``place``)."""
    channel = tl.arange(0, WIDTH)
    b_x = read(
        x, position, seen, table, head_row, i_b, i_h, tokens, stride_b, stride_h, stride_s,
        DIM, WIDTH, HAS_ORDER, False, not HAS_MEAN, ASM,
    )  # fmt: skip
    if HAS_MEAN:
        b_x -= tl.load(mean + head * DIM + channel, mask=channel < DIM, other=0.0)[None, :]
        # Nothing is as large as a number below 0: rows that are not there count as 0, and not as what they lack.
        b_x = tl.where(tl.abs(b_x) <= tl.where(seen, LARGEST, -1.0)[:, None], b_x, 0.0)
    if STEPS > 0:
        b_x = finite(hadamard(b_x, ROWS, WIDTH, STEPS) * NORM)
    top = tl.max(tl.abs(b_x), 1)
    if not PER_TOKEN:
        top = tl.zeros([ROWS], tl.float32) + tl.max(top, 0)
    b_scale, inverse = inverse_of(top, LIMIT)
    store_codes(out, head * tokens + position.to(tl.int64), b_x * inverse[:, None], inside, ROWS, WIDTH, KIND)
    if PER_TOKEN:
        tl.store(scale + head * tokens + position, b_scale, mask=inside)
    else:
        within = tl.arange(0, ROWS)
        tl.store(scale + place + within * 0, b_scale, mask=within == 0)


@triton.jit
def _quarter(
    v, PART: tl.constexpr, i_tile, inverse, table, head_row, valid, i_b, i_h, tokens, stride_b, stride_h, stride_s,
    DIM: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, HAS_ORDER: tl.constexpr, HAS_VALID: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Scaled values at places ``4i + PART`` of a tile, float32 ``[TILE / 4, WIDTH]``."""
    word = tl.arange(0, TILE // 4)
    # Place 4t + 2b + e holds key 8b + 2t + e of its 16.
    position = i_tile * TILE + word // 4 * 16 + PART // 2 * 8 + word % 4 * 2 + PART % 2
    seen = seen_at(position, tokens, valid, i_b, HAS_VALID)
    b_v = read(
        v, position, seen, table, head_row, i_b, i_h, tokens, stride_b, stride_h, stride_s,
        DIM, WIDTH, HAS_ORDER, False, True, ASM,
    )  # fmt: skip
    return b_v * inverse[None, :]


@triton.jit
def _value_codes(
    v, i_tile, out, factors, head, table, head_row, valid, i_b, i_h, tokens, stride_b, stride_h, stride_s,
    DIM: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, KIND: tl.constexpr,
    HAS_ORDER: tl.constexpr, HAS_VALID: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Codes of TILE values, transposed, four in a word; places beyond the last key become 0."""
    channel = tl.arange(0, WIDTH)
    inverse = tl.load(factors + head * WIDTH + channel)
    a = _quarter(
        v, 0, i_tile, inverse, table, head_row, valid, i_b, i_h, tokens, stride_b, stride_h, stride_s,
        DIM, WIDTH, TILE, HAS_ORDER, HAS_VALID, ASM,
    )  # fmt: skip
    b = _quarter(
        v, 1, i_tile, inverse, table, head_row, valid, i_b, i_h, tokens, stride_b, stride_h, stride_s,
        DIM, WIDTH, TILE, HAS_ORDER, HAS_VALID, ASM,
    )  # fmt: skip
    c = _quarter(
        v, 2, i_tile, inverse, table, head_row, valid, i_b, i_h, tokens, stride_b, stride_h, stride_s,
        DIM, WIDTH, TILE, HAS_ORDER, HAS_VALID, ASM,
    )  # fmt: skip
    d = _quarter(
        v, 3, i_tile, inverse, table, head_row, valid, i_b, i_h, tokens, stride_b, stride_h, stride_s,
        DIM, WIDTH, TILE, HAS_ORDER, HAS_VALID, ASM,
    )  # fmt: skip
    words = word_of(a, b, c, d, KIND, ASM)
    # A multiple of 16 bytes, written such that the compiler knows.
    columns = ((tokens + 127) // 128).to(tl.int64) * 32
    p_out = (
        out + (head * WIDTH + channel)[:, None] * columns + (i_tile * (TILE // 4) + tl.arange(0, TILE // 4))[None, :]
    )
    tl.store(p_out, tl.trans(words), eviction_policy="evict_first")


@triton.jit
def _key_sums(
    k, sums, mean, divisors, flag, i_chunk, head, table, head_row, valid, i_b, i_h, tokens, stride_b, stride_h, stride_s,
    DIM: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, PART: tl.constexpr, HAS_ORDER: tl.constexpr,
    HAS_VALID: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Add the sum of CHUNK keys, in float64; who is the last writes down the mean."""
    b_sum = tl.zeros([PART, WIDTH], tl.float64)
    for start in range(0, CHUNK, 8 * PART):
        for i in tl.static_range(8):
            position = i_chunk * CHUNK + start + i * PART + tl.arange(0, PART)
            b_k = read(
                k, position, seen_at(position, tokens, valid, i_b, HAS_VALID), table, head_row, i_b, i_h, tokens,
                stride_b, stride_h, stride_s, DIM, WIDTH, HAS_ORDER, True, True, ASM,
            )  # fmt: skip
            b_sum += b_k.to(tl.float64)
    channel = tl.arange(0, WIDTH)
    tl.atomic_add(sums + head * WIDTH + channel, tl.sum(b_sum, 0), sem="relaxed")
    if _last(flag, tl.cdiv(tokens, CHUNK)):
        divisor = tl.load(divisors + i_b) if HAS_VALID else tokens.to(tl.float64)
        b_mean = (tl.load(sums + head * WIDTH + channel, cache_modifier=".cg") / divisor).to(tl.float32)
        tl.store(mean + head * DIM + channel, b_mean, mask=channel < DIM)


@triton.jit
def _value_tops(
    v, tops, scale, flag, i_chunk, head, table, head_row, valid, i_b, i_h, tokens, stride_b, stride_h, stride_s,
    DIM: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, PART: tl.constexpr, LIMIT: tl.constexpr,
    HAS_ORDER: tl.constexpr, HAS_VALID: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Raise the largest magnitudes of the channels to those of CHUNK values; who is the last writes down the scales.

    In the place of the magnitudes he leaves the factors that make codes.
    """
    top = tl.zeros([PART, WIDTH], tl.float32)
    for start in range(0, CHUNK, 8 * PART):
        for i in tl.static_range(8):
            position = i_chunk * CHUNK + start + i * PART + tl.arange(0, PART)
            b_v = read(
                v, position, seen_at(position, tokens, valid, i_b, HAS_VALID), table, head_row, i_b, i_h, tokens,
                stride_b, stride_h, stride_s, DIM, WIDTH, HAS_ORDER, True, True, ASM,
            )  # fmt: skip
            top = tl.maximum(top, tl.abs(b_v))
    channel = tl.arange(0, WIDTH)
    tl.atomic_max(tops + head * WIDTH + channel, tl.max(top, 0), sem="relaxed")
    if _last(flag, tl.cdiv(tokens, CHUNK)):
        b_scale, inverse = inverse_of(tl.load(tops + head * WIDTH + channel, cache_modifier=".cg"), LIMIT)
        tl.store(scale + head * WIDTH + channel, b_scale)
        tl.store(tops + head * WIDTH + channel, inverse)


# What changes with the number of tokens alone must not compile another kernel.
@triton.jit(do_not_specialize=["q_tokens", "tokens", "heads"])
def queries_kernel(
    q, k, v, q_table, q_head, k_table, k_head, valid, divisors, q_out, q_scale, v_scale, mean, sums, tops, flags,
    q_tokens, tokens, heads, q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s,
    DIM: tl.constexpr, WIDTH: tl.constexpr, KIND: tl.constexpr, LIMIT: tl.constexpr, V_LIMIT: tl.constexpr,
    STEPS: tl.constexpr, NORM: tl.constexpr, HAS_Q_ORDER: tl.constexpr, HAS_ORDER: tl.constexpr,
    HAS_VALID: tl.constexpr, HAS_MEAN: tl.constexpr, HAS_VALUES: tl.constexpr, Q_TILE: tl.constexpr,
    CHUNK: tl.constexpr, PART: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One program: codes of Q_TILE queries, or statistics of CHUNK keys or values; of a head all of these in turn."""
    q_tiles, chunks = tl.cdiv(q_tokens, Q_TILE), tl.cdiv(tokens, CHUNK)
    first_key = q_tiles
    first_value = first_key + (chunks if HAS_MEAN else 0)
    each = first_value + (chunks if HAS_VALUES else 0)
    head32 = tl.program_id(0) // each
    at = tl.program_id(0) - head32 * each
    i_b, i_h, head = (head32 // heads).to(tl.int64), (head32 % heads).to(tl.int64), head32.to(tl.int64)
    flag = flags + head32 * 2
    # Sums and maxima do not depend on the order, unless it says which keys are valid.
    STATS_ORDER: tl.constexpr = HAS_ORDER and HAS_VALID
    if at < first_key:
        position = at * Q_TILE + tl.arange(0, Q_TILE)
        inside = position < q_tokens
        _row_codes(
            q, position, inside, inside, q, q_out, q_scale, head, 0, q_table, q_head, i_b, i_h, q_tokens,
            q_b, q_h, q_s, DIM, WIDTH, Q_TILE, KIND, LIMIT, STEPS, NORM, True, HAS_Q_ORDER, False, ASM,
        )  # fmt: skip
    elif at < first_value:
        if HAS_MEAN:
            _key_sums(
                k, sums, mean, divisors, flag, at - first_key, head, k_table, k_head, valid, i_b, i_h, tokens,
                k_b, k_h, k_s, DIM, WIDTH, CHUNK, PART, STATS_ORDER, HAS_VALID, ASM,
            )  # fmt: skip
    elif HAS_VALUES:
        _value_tops(
            v, tops, v_scale, flag + 1, at - first_value, head, k_table, k_head, valid, i_b, i_h, tokens, v_b, v_h, v_s,
            DIM, WIDTH, CHUNK, PART, V_LIMIT, STATS_ORDER, HAS_VALID, ASM,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "heads", "blocks"])
def keys_kernel(
    k, v, k_table, k_head, valid, k_out, k_scale, v_out, mean, tops, tokens, heads, blocks,
    k_b, k_h, k_s, v_b, v_h, v_s,
    DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, KIND: tl.constexpr,
    LIMIT: tl.constexpr, V_KIND: tl.constexpr, STEPS: tl.constexpr, NORM: tl.constexpr, HAS_ORDER: tl.constexpr,
    HAS_VALID: tl.constexpr, HAS_MEAN: tl.constexpr, HAS_VALUES: tl.constexpr, V_TILE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One program: codes of a block of keys, or of V_TILE values; the last head first."""
    each = blocks + (tl.cdiv(tokens, 128) * (128 // V_TILE) if HAS_VALUES else 0)
    work = tl.num_programs(0) - 1 - tl.program_id(0)
    head32 = work // each
    at = work - head32 * each
    i_b, i_h, head = (head32 // heads).to(tl.int64), (head32 % heads).to(tl.int64), head32.to(tl.int64)
    if at < blocks:
        rows = tl.arange(0, ROWS)
        position = at * BLOCK + rows
        inside = (rows < BLOCK) & (position < tokens)
        seen = inside & seen_at(position, tokens, valid, i_b, HAS_VALID)
        _row_codes(
            k, position, inside, seen, mean, k_out, k_scale + head * blocks, head, at, k_table, k_head, i_b, i_h,
            tokens, k_b, k_h, k_s, DIM, WIDTH, ROWS, KIND, LIMIT, STEPS, NORM, False, HAS_ORDER, HAS_MEAN, ASM,
        )  # fmt: skip
    elif HAS_VALUES:
        _value_codes(
            v, at - blocks, v_out, tops, head, k_table, k_head, valid, i_b, i_h, tokens, v_b, v_h, v_s,
            DIM, WIDTH, V_TILE, V_KIND, HAS_ORDER, HAS_VALID, ASM,
        )  # fmt: skip


AOT_SPECS = aot_specs(queries_kernel, keys_kernel, clear_kernel)
