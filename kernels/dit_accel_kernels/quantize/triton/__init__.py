"""The quantiser in Triton: two launches and one that hardly ever has anything to do; each token is read once.

Before the codes of a head's keys can be made its mean key must be known, and before those of its values how large they are
in each channel. A sample tells both (:mod:`.statistics`); the first launch looks through it beside the codes of the
queries, which need neither. The second makes the codes of keys and values. Where a value turns out to be larger than the
scale of its channel can say, it notes how large, and the third makes the codes of this head's values again.

The bits are those of the reference. The kernels are compiled without fusing products and sums into multiply-adds, because
a fused one rounds once where the reference rounds twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..specs import aot_specs
from .elements import LARGEST, finite, hadamard, inverse_of, octaves_of, read, seen_at, store_codes, word_of
from .statistics import channel_tops, key_mean, key_sums, value_tops, wait_for_others

__all__ = ["AOT_SPECS", "keys_kernel", "mend_kernel", "queries_kernel"]


@triton.jit
def _row_codes(
    b_x, position, inside, seen, mean, out, scale, head, place, tokens,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, KIND: tl.constexpr, LIMIT: tl.constexpr,
    STEPS: tl.constexpr, NORM: tl.constexpr, PER_TOKEN: tl.constexpr, HAS_MEAN: tl.constexpr,
):  # fmt: skip
    """Codes of ROWS queries (one scale each) or of a block of keys (one scale for all, at ``place``)."""
    if HAS_MEAN:
        b_x -= mean[None, :]
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
    v, PART: tl.constexpr, i_tile, table, head_row, valid, i_b, i_h, tokens, stride_b, stride_h, stride_s,
    DIM: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, HAS_ORDER: tl.constexpr, HAS_VALID: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Values at places ``4i + PART`` of a tile, float32 ``[TILE / 4, WIDTH]``."""
    word = tl.arange(0, TILE // 4)
    # Place 4t + 2b + e holds key 8b + 2t + e of its 16.
    position = i_tile * TILE + word // 4 * 16 + PART // 2 * 8 + word % 4 * 2 + PART % 2
    seen = seen_at(position, tokens, valid, i_b, HAS_VALID)
    return read(
        v, position, seen, table, head_row, i_b, i_h, tokens, stride_b, stride_h, stride_s,
        DIM, WIDTH, HAS_ORDER, False, True, ASM,
    )  # fmt: skip


@triton.jit
def _quarters(
    v, i_tile, table, head_row, valid, i_b, i_h, tokens, stride_b, stride_h, stride_s,
    DIM: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, HAS_ORDER: tl.constexpr, HAS_VALID: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """TILE values in four parts, as they go into words."""
    a = _quarter(
        v, 0, i_tile, table, head_row, valid, i_b, i_h, tokens, stride_b, stride_h, stride_s,
        DIM, WIDTH, TILE, HAS_ORDER, HAS_VALID, ASM,
    )  # fmt: skip
    b = _quarter(
        v, 1, i_tile, table, head_row, valid, i_b, i_h, tokens, stride_b, stride_h, stride_s,
        DIM, WIDTH, TILE, HAS_ORDER, HAS_VALID, ASM,
    )  # fmt: skip
    c = _quarter(
        v, 2, i_tile, table, head_row, valid, i_b, i_h, tokens, stride_b, stride_h, stride_s,
        DIM, WIDTH, TILE, HAS_ORDER, HAS_VALID, ASM,
    )  # fmt: skip
    d = _quarter(
        v, 3, i_tile, table, head_row, valid, i_b, i_h, tokens, stride_b, stride_h, stride_s,
        DIM, WIDTH, TILE, HAS_ORDER, HAS_VALID, ASM,
    )  # fmt: skip
    return a, b, c, d


@triton.jit
def _value_codes(
    quarters, i_tile, out, inverse, head, tokens, WIDTH: tl.constexpr, TILE: tl.constexpr, KIND: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Codes of TILE values, transposed, four in a word, which it returns; places beyond the last key become 0."""
    a, b, c, d = quarters
    channel, factor = tl.arange(0, WIDTH), inverse[None, :]
    words = word_of(a * factor, b * factor, c * factor, d * factor, KIND, ASM)
    # A multiple of 16 bytes, written such that the compiler knows.
    columns = ((tokens + 127) // 128).to(tl.int64) * 32
    p_out = (
        out + (head * WIDTH + channel)[:, None] * columns + (i_tile * (TILE // 4) + tl.arange(0, TILE // 4))[None, :]
    )
    tl.store(p_out, tl.trans(words), eviction_policy="evict_first")
    return words


@triton.jit
def _note_larger(
    v, words, again, i_tile, head, table, head_row, valid, i_b, i_h, tokens, stride_b, stride_h, stride_s,
    DIM: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, HAS_ORDER: tl.constexpr, HAS_VALID: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Note the largest magnitudes of TILE values if a code is 256 or more, which none is within what was expected."""
    larger = ((words & 0x7F7F7F7F) + 0x08080808) & -0x7F7F7F80
    if tl.max(tl.max((larger != 0).to(tl.int32), 1), 0) != 0:
        position = i_tile * TILE + tl.arange(0, TILE)
        b_v = read(
            v, position, seen_at(position, tokens, valid, i_b, HAS_VALID), table, head_row, i_b, i_h, tokens,
            stride_b, stride_h, stride_s, DIM, WIDTH, HAS_ORDER, False, True, ASM,
        )  # fmt: skip
        at = again + head * (WIDTH + 8)
        tl.atomic_max(at + tl.arange(0, WIDTH), tl.max(tl.abs(b_v), 0), sem="relaxed")
        tl.store(at + WIDTH, 1.0)


# What changes with the number of tokens alone must not compile another kernel.
@triton.jit(do_not_specialize=["q_tokens", "tokens", "heads", "k_samples", "k_step", "v_samples", "v_step"])
def queries_kernel(
    q, k, v, q_table, q_head, k_table, k_head, valid, q_out, q_scale, sums, tops, again,
    q_tokens, tokens, heads, k_samples, k_step, v_samples, v_step, q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s,
    DIM: tl.constexpr, WIDTH: tl.constexpr, KIND: tl.constexpr, LIMIT: tl.constexpr,
    STEPS: tl.constexpr, NORM: tl.constexpr, HAS_Q_ORDER: tl.constexpr, HAS_ORDER: tl.constexpr,
    HAS_VALID: tl.constexpr, K_PARTS: tl.constexpr, V_PARTS: tl.constexpr, Q_TILE: tl.constexpr,
    PART: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: a part of the sample of a head's keys or values, these first, or codes of Q_TILE queries.

    ``K_PARTS`` is 0 without smoothing, ``V_PARTS`` with 16-bit values.
    """
    wait_for_others(PDL)
    PARTS: tl.constexpr = K_PARTS + V_PARTS
    q_tiles = tl.cdiv(q_tokens, Q_TILE)
    queries = tl.num_programs(0) // (q_tiles + PARTS) * q_tiles
    early = tl.num_programs(0) - queries
    at = tl.program_id(0)
    if at >= early:
        head32 = (at - early) // q_tiles
        i_tile = at - early - head32 * q_tiles
        i_b, i_h, head = (head32 // heads).to(tl.int64), (head32 % heads).to(tl.int64), head32.to(tl.int64)
        position = i_tile * Q_TILE + tl.arange(0, Q_TILE)
        inside = position < q_tokens
        b_q = read(
            q, position, inside, q_table, q_head, i_b, i_h, q_tokens, q_b, q_h, q_s,
            DIM, WIDTH, HAS_Q_ORDER, False, True, ASM,
        )  # fmt: skip
        _row_codes(
            b_q, position, inside, inside, 0.0, q_out, q_scale, head, 0, q_tokens,
            WIDTH, Q_TILE, KIND, LIMIT, STEPS, NORM, True, False,
        )  # fmt: skip
    elif PARTS > 0:
        head32 = at // PARTS
        i_part = at - head32 * PARTS
        i_b, i_h, head = (head32 // heads).to(tl.int64), (head32 % heads).to(tl.int64), head32.to(tl.int64)
        if i_part < K_PARTS:
            if K_PARTS > 0:
                key_sums(
                    k, sums, i_part, head, k_table, k_head, valid, i_b, i_h, tokens, k_samples, k_step, k_b, k_h, k_s,
                    DIM, WIDTH, K_PARTS, PART, HAS_ORDER, HAS_VALID, ASM,
                )  # fmt: skip
        elif V_PARTS > 0:
            value_tops(
                v, tops, again, i_part - K_PARTS, head, k_table, k_head, valid, i_b, i_h, tokens, v_samples, v_step,
                v_b, v_h, v_s, DIM, WIDTH, V_PARTS, PART, HAS_ORDER, HAS_VALID, ASM,
            )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "heads", "blocks", "k_samples", "headroom", "least"])
def keys_kernel(
    k, v, k_table, k_head, valid, divisors, k_out, k_scale, v_out, v_scale, mean, sums, tops, again,
    tokens, heads, blocks, k_samples, headroom, least, k_b, k_h, k_s, v_b, v_h, v_s,
    DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, KIND: tl.constexpr,
    LIMIT: tl.constexpr, V_KIND: tl.constexpr, V_LIMIT: tl.constexpr, STEPS: tl.constexpr, NORM: tl.constexpr,
    HAS_ORDER: tl.constexpr, HAS_VALID: tl.constexpr, K_PARTS: tl.constexpr, V_PARTS: tl.constexpr,
    V_TILE: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: codes of a block of keys, or of V_TILE values."""
    wait_for_others(PDL)
    each = blocks + (tl.cdiv(tokens, 128) * (128 // V_TILE) if V_PARTS > 0 else 0)
    head32 = tl.program_id(0) // each
    at = tl.program_id(0) - head32 * each
    i_b, i_h, head = (head32 // heads).to(tl.int64), (head32 % heads).to(tl.int64), head32.to(tl.int64)
    channel = tl.arange(0, WIDTH)
    if at < blocks:
        rows = tl.arange(0, ROWS)
        position = at * BLOCK + rows
        inside = (rows < BLOCK) & (position < tokens)
        seen = inside & seen_at(position, tokens, valid, i_b, HAS_VALID)
        # Before the sample is put together, so that nobody waits twice.
        b_k = read(
            k, position, seen, k_table, k_head, i_b, i_h, tokens, k_b, k_h, k_s,
            DIM, WIDTH, HAS_ORDER, False, K_PARTS == 0, ASM,
        )  # fmt: skip
        b_mean = 0.0
        if K_PARTS > 0:
            b_mean = key_mean(sums, divisors, head, i_b, k_samples, WIDTH, K_PARTS, HAS_VALID)
            tl.store(mean + head * DIM + channel, b_mean, mask=(channel < DIM) & (at == 0))
        _row_codes(
            b_k, position, inside, seen, b_mean, k_out, k_scale + head * blocks, head, at, tokens,
            WIDTH, ROWS, KIND, LIMIT, STEPS, NORM, False, K_PARTS > 0,
        )  # fmt: skip
    elif V_PARTS > 0:
        i_tile = at - blocks
        quarters = _quarters(
            v, i_tile, k_table, k_head, valid, i_b, i_h, tokens, v_b, v_h, v_s,
            DIM, WIDTH, V_TILE, HAS_ORDER, HAS_VALID, ASM,
        )  # fmt: skip
        top = channel_tops(tops, head, headroom, least, WIDTH, V_PARTS)
        b_scale, inverse = octaves_of(top) if V_KIND == "fp8" else inverse_of(top, V_LIMIT)
        tl.store(v_scale + head * WIDTH + channel, b_scale, mask=i_tile + channel * 0 == 0)
        words = _value_codes(quarters, i_tile, v_out, inverse, head, tokens, WIDTH, V_TILE, V_KIND, ASM)
        if V_KIND == "fp8":  # noqa: SIM102
            if headroom > 1.0:
                _note_larger(
                    v, words, again, i_tile, head, k_table, k_head, valid, i_b, i_h, tokens, v_b, v_h, v_s,
                    DIM, WIDTH, V_TILE, HAS_ORDER, HAS_VALID, ASM,
                )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "heads", "headroom", "least"])
def mend_kernel(
    v, k_table, k_head, valid, v_out, v_scale, tops, again, tokens, heads, headroom, least, v_b, v_h, v_s,
    DIM: tl.constexpr, WIDTH: tl.constexpr, V_KIND: tl.constexpr, HAS_ORDER: tl.constexpr,
    HAS_VALID: tl.constexpr, V_PARTS: tl.constexpr, V_TILE: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Make the codes of a head's values again if one was larger than the sample had let expect; some programs a head."""
    wait_for_others(PDL)
    head32 = tl.program_id(1)
    i_b, i_h, head = (head32 // heads).to(tl.int64), (head32 % heads).to(tl.int64), head32.to(tl.int64)
    larger = again + head * (WIDTH + 8)
    if tl.load(larger + WIDTH) != 0.0:
        channel = tl.arange(0, WIDTH)
        top = tl.maximum(channel_tops(tops, head, headroom, least, WIDTH, V_PARTS), tl.load(larger + channel))
        b_scale, inverse = octaves_of(top)
        tl.store(v_scale + head * WIDTH + channel, b_scale, mask=tl.program_id(0) + channel * 0 == 0)
        for i_tile in range(tl.program_id(0), tl.cdiv(tokens, 128) * (128 // V_TILE), tl.num_programs(0)):
            quarters = _quarters(
                v, i_tile, k_table, k_head, valid, i_b, i_h, tokens, v_b, v_h, v_s,
                DIM, WIDTH, V_TILE, HAS_ORDER, HAS_VALID, ASM,
            )  # fmt: skip
            _value_codes(quarters, i_tile, v_out, inverse, head, tokens, WIDTH, V_TILE, V_KIND, ASM)


AOT_SPECS = aot_specs(queries_kernel, keys_kernel, mend_kernel)
