"""Elements of the quantiser: from 16-bit tokens to float32 numbers, to codes, to words of four codes.

Instructions decide how fast it is, not memory, unless they are few. So codes are the lowest bits of a float32 and need no
bounds, and where the hardware is known (``ASM``) pairs of bfloat16 are compared and widened, and codes packed, by hand.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "LARGEST",
    "finite",
    "hadamard",
    "inverse_of",
    "octaves_of",
    "read",
    "rounded",
    "seen_at",
    "store_codes",
    "wide",
    "word_of",
]

LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def finite(x):
    """0 in the place of what is not finite; comparisons with NaN are false."""
    return tl.where(tl.abs(x) <= LARGEST, x, 0.0)


@triton.jit
def wide(x, FINITE: tl.constexpr, ASM: tl.constexpr):
    """To float32; with ``FINITE`` 0 for what is not finite."""
    if ASM and x.dtype == tl.bfloat16:
        if FINITE:
            return tl.inline_asm_elementwise(
                """{ .reg .b32 a, m; mov.b32 m, 0x7f7f7f7f; abs.bf16x2 a, $2; set.le.u32.bf16x2 a, a, m;
                and.b32 a, a, $2;
                shl.b32 $0, a, 16; and.b32 $1, a, 0xffff0000; }""",
                "=f,=f,r", [x], dtype=tl.float32, is_pure=True, pack=2,
            )  # fmt: skip
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=f,=f,r", [x], dtype=tl.float32, is_pure=True, pack=2
        )
    if FINITE:
        return finite(x.to(tl.float32))
    return x.to(tl.float32)


@triton.jit
def _tokens(table, head_row, position, inside, i_h, tokens, HAS_ORDER: tl.constexpr):
    """Natural places of the positions of block order, int64."""
    if HAS_ORDER:
        table += tl.load(head_row + i_h).to(tl.int64) * tokens
        return tl.load(table + position, mask=inside, other=0).to(tl.int64)
    return position.to(tl.int64)


@triton.jit
def hadamard(x, ROWS: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr):
    """The fast transform of runs of ``2 ** STEPS`` columns, without its factor."""
    for i in tl.static_range(STEPS):
        pairs = x.reshape(ROWS, WIDTH // (2 << i), 2, 1 << i).permute(0, 1, 3, 2)
        a, b = tl.split(pairs)
        x = tl.join(a + b, a - b).permute(0, 1, 3, 2).reshape(ROWS, WIDTH)
    return x


@triton.jit
def rounded(y):
    """To the nearest integer, ties to even: 1.5 * 2 ** 23 leaves it in the lowest bits of an int32.

    Codes are out of bounds by rounding errors alone, so the nearest integer never is.
    """
    return (y + 12582912.0).to(tl.int32, bitcast=True)


@triton.jit
def store_codes(out, row, y, mask, ROWS: tl.constexpr, WIDTH: tl.constexpr, KIND: tl.constexpr):
    """Store scaled ``y [ROWS, WIDTH]`` as codes in rows ``row``; ``mask`` marks the rows there are."""
    if KIND == "int4":
        HALF: tl.constexpr = WIDTH // 2
        low, high = tl.split(rounded(y).to(tl.int8).reshape(ROWS, 2, HALF).permute(0, 2, 1))
        codes = ((low & 15) | (high << 4)).to(tl.uint8, bitcast=True)
        p_out = out + row[:, None] * HALF + tl.arange(0, HALF)[None, :]
    else:
        codes = rounded(y).to(tl.int8) if KIND == "int8" else y.to(tl.float8e4nv)
        p_out = out + row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(p_out, codes, mask=mask[:, None], eviction_policy="evict_first")


@triton.jit
def inverse_of(top, LIMIT: tl.constexpr):
    """The scale of groups with the largest magnitudes ``top``, and the factor that makes codes."""
    empty = top < 7.888609052210118e-31  # 2 ** -100
    inverse = tl.div_rn(tl.zeros_like(top) + 1.0, tl.where(empty, 1.0, top)) * LIMIT
    return tl.where(empty, 1.0, top * (1.0 / LIMIT)), tl.where(empty, 0.0, inverse)


@triton.jit
def octaves_of(top):
    """Scales and factors as of :func:`inverse_of` that are powers of two, for e4m3: codes are below 256."""
    empty = top < 7.888609052210118e-31  # 2 ** -100
    place = top.to(tl.int32, bitcast=True) >> 23
    scale, inverse = (
        ((place - 7) << 23).to(tl.float32, bitcast=True),
        ((261 - place) << 23).to(tl.float32, bitcast=True),
    )
    return tl.where(empty, 1.0, scale), tl.where(empty, 0.0, inverse)


@triton.jit
def seen_at(position, tokens, valid, i_b, HAS_VALID: tl.constexpr):
    """Which positions hold a key that counts."""
    inside = position < tokens
    if HAS_VALID:
        inside = inside & (tl.load(valid + i_b * tokens + position, mask=inside, other=0) != 0)
    return inside


@triton.jit
def read(
    x, position, inside, table, head_row, i_b, i_h, tokens, stride_b, stride_h, stride_s,
    DIM: tl.constexpr, WIDTH: tl.constexpr, HAS_ORDER: tl.constexpr, AGAIN: tl.constexpr, FINITE: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Tokens at positions of block order, float32 ``[ROWS, WIDTH]``, 0 where there is none; ``AGAIN``: read once more."""
    channel = tl.arange(0, WIDTH)
    token = _tokens(table, head_row, position, inside, i_h, tokens, HAS_ORDER)
    mask = inside[:, None] & (channel[None, :] < DIM)
    p_x = x + i_b * stride_b + i_h * stride_h + token[:, None] * stride_s + channel[None, :]
    if AGAIN:
        b_x = tl.load(p_x, mask=mask, other=0.0, eviction_policy="evict_last")
    else:
        b_x = tl.load(p_x, mask=mask, other=0.0, eviction_policy="evict_first")
    return wide(b_x, FINITE, ASM)


@triton.jit
def _byte(y, KIND: tl.constexpr):
    """Codes as int32 of 0 to 255."""
    if KIND == "int8":
        return rounded(y) & 255
    else:
        return y.to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int32)


@triton.jit
def word_of(a, b, c, d, KIND: tl.constexpr, ASM: tl.constexpr):
    """Words of four codes."""
    if ASM and KIND == "fp8":
        return tl.inline_asm_elementwise(
            """{ .reg .b16 l, h; cvt.rn.satfinite.e4m3x2.f32 l, $2, $1; cvt.rn.satfinite.e4m3x2.f32 h, $4, $3;
            mov.b32 $0, {l, h}; }""",
            "=r,f,f,f,f", [a, b, c, d], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    return _byte(a, KIND) | (_byte(b, KIND) << 8) | (_byte(c, KIND) << 16) | (_byte(d, KIND) << 24)
