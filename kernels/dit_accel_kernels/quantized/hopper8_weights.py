"""Weights of the 8-bit Hopper kernel: from products to exponentials, to words of four e4m3 codes, to operands.

Also the register in which a warp notes that weights have become too large; see :mod:`.hopper8`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

__all__ = [
    "codes_of",
    "codes_of_logits",
    "declare_flag",
    "first_logits",
    "halves",
    "load_scales",
    "logits",
    "note_sums",
    "operand",
    "shares_of",
    "start_logits",
    "sums_of_codes",
    "too_large",
    "total",
    "vote_on_sums",
    "voted",
    "weights_of",
    "whole",
]


@gluon.jit
def declare_flag(anything, I_W: gl.constexpr):
    """Declare the register in which a warp of consumer ``I_W`` notes that weights are too large; returns its argument.

    Gluon can make a scalar out of a tensor by a reduction across the warpgroup only: shuffles, shared memory and two
    barriers. A register of PTX that no value of the compiler stands for costs nothing.
    """
    TEXT: gl.constexpr = (
        ".reg .u32 too_large_0;\nmov.u32 too_large_0, 0;\nmov.u32 $0, $1;"
        if I_W == 0
        else ".reg .u32 too_large_1;\nmov.u32 too_large_1, 0;\nmov.u32 $0, $1;"
    )
    return gl.inline_asm_elementwise(TEXT, "=r,r", [anything], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def note_sums(sums, limit, I_W: gl.constexpr):
    """Note sums of the weights of a tile above ``limit``, and those that are NaN."""
    TEXT: gl.constexpr = (
        """{ .reg .pred a; setp.gtu.f32 a, $2, $4; @a mov.u32 too_large_0, -1; setp.gtu.f32 a, $3, $4;
        @a mov.u32 too_large_0, -1; mov.f32 $0, $2; mov.f32 $1, $3; }"""
        if I_W == 0
        else """{ .reg .pred a; setp.gtu.f32 a, $2, $4; @a mov.u32 too_large_1, -1; setp.gtu.f32 a, $3, $4;
        @a mov.u32 too_large_1, -1; mov.f32 $0, $2; mov.f32 $1, $3; }"""
    )
    return gl.inline_asm_elementwise(TEXT, "=f,=f,f,f,f,f", [sums, limit], dtype=gl.float32, is_pure=False, pack=2)


@gluon.jit
def too_large(anything, I_W: gl.constexpr):
    """Whether a lane of this warp has noted something since it was last asked."""
    TEXT: gl.constexpr = (
        """{ .reg .pred a; .reg .u32 t; and.b32 t, too_large_0, 0x80808080; setp.ne.u32 a, t, 0;
        vote.sync.any.pred a, a, -1; @a nanosleep.u32 1; mov.u32 too_large_0, 0; selp.u32 $0, 1, 0, a; // $1
        }"""
        if I_W == 0
        else """{ .reg .pred a; .reg .u32 t; and.b32 t, too_large_1, 0x80808080; setp.ne.u32 a, t, 0;
        vote.sync.any.pred a, a, -1; @a nanosleep.u32 1; mov.u32 too_large_1, 0; selp.u32 $0, 1, 0, a; // $1
        }"""
    )
    return gl.inline_asm_elementwise(TEXT, "=r,r", [anything], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def vote_on_sums(sums, limit, I_W: gl.constexpr):
    """Note whether a lane of this warp has sums of the weights of a tile above ``limit``, or NaN; of two rows a lane.

    Fewer instructions than :func:`note_sums` and :func:`too_large`, but ptxas moves no exponentials across the vote.
    """
    TEXT: gl.constexpr = (
        """{ .reg .pred a; setp.gtu.f32 a, $2, $4; setp.gtu.or.f32 a, $3, $4, a; vote.sync.any.pred a, a, -1;
        selp.u32 too_large_0, 1, 0, a; mov.f32 $0, $2; mov.f32 $1, $3; }"""
        if I_W == 0
        else """{ .reg .pred a; setp.gtu.f32 a, $2, $4; setp.gtu.or.f32 a, $3, $4, a; vote.sync.any.pred a, a, -1;
        selp.u32 too_large_1, 1, 0, a; mov.f32 $0, $2; mov.f32 $1, $3; }"""
    )
    return gl.inline_asm_elementwise(TEXT, "=f,=f,f,f,f,f", [sums, limit], dtype=gl.float32, is_pure=False, pack=2)


@gluon.jit
def voted(anything, I_W: gl.constexpr):
    """Whether this warp has noted something; its argument is not used."""
    TEXT: gl.constexpr = "mov.u32 $0, too_large_0; // $1" if I_W == 0 else "mov.u32 $0, too_large_1; // $1"
    return gl.inline_asm_elementwise(TEXT, "=r,r", [anything], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def shares_of(weights):
    """Sums of the four shares of each row that different lanes hold, ``[64, 4]``: lanes add up once a job."""
    return gl.sum(gl.sum(weights.reshape([64, 8, 4, 2]), 3), 1)


@gluon.jit
def total(shares, HALF: gl.constexpr):
    """Sums of the rows from those of their shares."""
    return gl.convert_layout(gl.sum(shares, 1), gl.SliceLayout(1, HALF))


@gluon.jit
def halves(x, HALF: gl.constexpr):
    """The two halves of the columns of a tensor in layout ``HALF``; no lane gives anything to another."""
    a, b = x.reshape([64, 2, x.shape[1] // 2]).permute([0, 2, 1]).split()
    return gl.convert_layout(a, HALF, assert_trivial=True), gl.convert_layout(b, HALF, assert_trivial=True)


@gluon.jit
def whole(a, b, WHOLE: gl.constexpr):
    """Undo :func:`halves`."""
    return gl.convert_layout(gl.join(a, b).permute([0, 2, 1]).reshape([64, 128]), WHOLE, assert_trivial=True)


@gluon.jit
def fours(x):
    """Columns ``8b + 2t + e`` of each 16 of a half as four tensors ``[64, 4, 4]`` over columns ``4t + 2b + e``.

    A thread of the accumulator holds the former and hands in the latter, the order in which the keys of the values lie in
    memory. Only registers get other names.
    """
    GROUPS: gl.constexpr = x.shape[1] // 16
    even, odd = x.reshape([64, GROUPS, 2, 4, 2]).permute([0, 1, 3, 2, 4]).split()  # row, 16 columns, t, b, e
    a, c = even.split()
    b, d = odd.split()
    return a, b, c, d


@gluon.jit
def pack_codes(a, b, c, d):
    """Four weights as e4m3 in a word, the form in which they are carried to the product with the values.

    LLVM would carry four codes through branches and loops in a register each, and pay 200 instructions a step for it.
    """
    return gl.inline_asm_elementwise(
        """{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, $2, $1; cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
        mov.b32 $0, {low, high}; }""",
        "=r,f,f,f,f", [a, b, c, d], dtype=gl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def codes_of_logits(x, base):
    """Words of codes from logits."""
    a, b, c, d = fours(gl.exp2(x - gl.expand_dims(base, 1)))
    return pack_codes(a, b, c, d)


@gluon.jit
def _half_bits(s, slope, offset):
    """Bits of a float16 near the weight, in the lower half of a word: 1024 an octave, in between a straight line.

    ``s * slope + offset`` is the place between 2^-15 and 2^15, out of bounds the nearer one. The line lies above the power
    by 6 % at most; ``offset`` takes off what it does so on average, so that a weight is off by 1.9 % in the mean square,
    where rounding to e4m3 takes 2.5 %. No special-function unit is needed.
    """
    return gl.inline_asm_elementwise(
        """{ .reg .f32 z; fma.rn.sat.f32 z, $1, $2, $3; fma.rn.f32 z, z, 0f46F00000, 0f4B400000; mov.b32 $0, z; }""",
        "=r,f,f,f", [s, slope, offset], dtype=gl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _per_row(x, like):
    """One number a row, to go with ``[64, 4, 4]``."""
    rows = gl.convert_layout(x, gl.SliceLayout(1, gl.SliceLayout(2, like.type.layout)))
    return gl.expand_dims(gl.expand_dims(rows, 1), 2)


@gluon.jit
def codes_of(s, factor, base, LINES: gl.constexpr):
    """Words of codes of one half: weights are ``exp2(s * factor - base)``, with ``LINES`` every other pair by a line."""
    a, b, c, d = fours(s.to(gl.float32))
    f, g = _per_row(factor, a), _per_row(base, a)
    a, b = gl.exp2(a * f - g), gl.exp2(b * f - g)
    if not LINES:
        return pack_codes(a, b, gl.exp2(c * f - g), gl.exp2(d * f - g))
    # 30720 float16 bits are 30 octaves, from 2^-15; log2 of the line is 0.0573 too large on average.
    slope, offset = _per_row(factor * (1.0 / 30.0), a), _per_row((15.0 - 0.0573) / 30.0 - base * (1.0 / 30.0), a)
    return gl.inline_asm_elementwise(
        """{ .reg .b16 l, h; .reg .b32 t; cvt.rn.satfinite.e4m3x2.f32 l, $2, $1; prmt.b32 t, $3, $4, 0x5410;
        cvt.rn.satfinite.e4m3x2.f16x2 h, t; mov.b32 $0, {l, h}; }""",
        "=r,f,f,r,r", [a, b, _half_bits(c, slope, offset), _half_bits(d, slope, offset)], dtype=gl.int32, is_pure=True,
        pack=1,
    )  # fmt: skip


@gluon.jit
def _columns(p):
    """Words ``[64, 4, 4]`` as four tensors ``[64, 4]``, one for each 16 columns."""
    x, y = p.permute([0, 2, 1]).reshape([64, 4, 2, 2]).split()
    a, c = x.split()
    b, d = y.split()
    return a, b, c, d


@gluon.jit
def sums_of_codes(p0, p1):
    """Sums of the rounded weights of a tile in four shares of each row, ``[64, 4]``.

    By rounded weights, so that one that outweighs all others is 1 whatever its rounding. Pairs of codes become pairs of
    float16, which have room for sums of 16: as many instructions as sums of float32 would be.
    """
    a, b, c, d = _columns(p0)
    e, f, g, h = _columns(p1)
    return gl.inline_asm_elementwise(
        """{ .reg .b16 l, h; .reg .b32 s, t, u, v, x, y; .reg .f32 m, n;
        mov.b32 {l, h}, $1; cvt.rn.f16x2.e4m3x2 x, l; cvt.rn.f16x2.e4m3x2 y, h; add.rn.f16x2 s, x, y;
        mov.b32 {l, h}, $2; cvt.rn.f16x2.e4m3x2 x, l; cvt.rn.f16x2.e4m3x2 y, h; add.rn.f16x2 t, x, y;
        mov.b32 {l, h}, $3; cvt.rn.f16x2.e4m3x2 x, l; cvt.rn.f16x2.e4m3x2 y, h; add.rn.f16x2 u, x, y;
        mov.b32 {l, h}, $4; cvt.rn.f16x2.e4m3x2 x, l; cvt.rn.f16x2.e4m3x2 y, h; add.rn.f16x2 v, x, y;
        add.rn.f16x2 s, s, t; add.rn.f16x2 u, u, v; add.rn.f16x2 s, s, u;
        mov.b32 {l, h}, $5; cvt.rn.f16x2.e4m3x2 x, l; cvt.rn.f16x2.e4m3x2 y, h; add.rn.f16x2 t, x, y;
        mov.b32 {l, h}, $6; cvt.rn.f16x2.e4m3x2 x, l; cvt.rn.f16x2.e4m3x2 y, h; add.rn.f16x2 u, x, y;
        add.rn.f16x2 t, t, u;
        mov.b32 {l, h}, $7; cvt.rn.f16x2.e4m3x2 x, l; cvt.rn.f16x2.e4m3x2 y, h; add.rn.f16x2 u, x, y;
        mov.b32 {l, h}, $8; cvt.rn.f16x2.e4m3x2 x, l; cvt.rn.f16x2.e4m3x2 y, h; add.rn.f16x2 v, x, y;
        add.rn.f16x2 u, u, v; add.rn.f16x2 t, t, u; add.rn.f16x2 s, s, t;
        mov.b32 {l, h}, s; cvt.f32.f16 m, l; cvt.f32.f16 n, h; add.f32 $0, m, n; }""",
        "=f,r,r,r,r,r,r,r,r", [a, b, c, d, e, f, g, h], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def operand(p, O_LAYOUT: gl.constexpr):
    """Words of codes as the operand of a product, in registers of its own.

    The move is one that the compiler must keep: it could otherwise make the next weights in the registers of an operand
    that a product still reads (C7513: all products one after the other).
    """
    # Four elements with the same word, so that four elements of 8 bits can be made of it.
    words = gl.join(gl.join(p, p), gl.join(p, p)).reshape([64, 64])
    words = gl.convert_layout(words, gl.DotOperandLayout(0, O_LAYOUT, 4), assert_trivial=True)
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r,r,r,r", [words], dtype=gl.float8e4nv, is_pure=False, pack=4
    )


@gluon.jit
def start_logits(q_op, k_bufs, at, S_LAYOUT: gl.constexpr, D: gl.constexpr):
    """Begin the product of the queries with the keys of a tile, ``[64, 128]``."""
    k_tile = k_bufs.index(at).reshape([128, D]).permute([1, 0])
    if k_bufs.dtype == gl.int8:
        s = gl.zeros([64, 128], gl.int32, layout=S_LAYOUT)
    else:
        s = gl.zeros([64, 128], gl.float32, layout=S_LAYOUT)
    return warpgroup_mma(q_op, k_tile, s, use_acc=False, is_async=True)


@gluon.jit
def start_half(q_op, k_bufs, at, PART: gl.constexpr, HALF: gl.constexpr, D: gl.constexpr):
    """Begin the product of the queries with one half of the keys of a tile, ``[64, 64]``."""
    k_tile = k_bufs.index(at).reshape([128, D]).slice(PART * 64, 64).permute([1, 0])
    if k_bufs.dtype == gl.int8:
        s = gl.zeros([64, 64], gl.int32, layout=HALF)
    else:
        s = gl.zeros([64, 64], gl.float32, layout=HALF)
    return warpgroup_mma(q_op, k_tile, s, use_acc=False, is_async=True)


@gluon.jit
def load_scales(scales, stage):
    """The scales of the two halves of a tile."""
    ALL: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])
    x = scales.index(stage).load(ALL)
    o = gl.arange(0, 2, layout=ALL)
    return gl.sum(gl.where(o == 0, x, 0.0), 0), gl.sum(gl.where(o == 1, x, 0.0), 0)


@gluon.jit
def logits(s, factor):
    """Logits of one half in units of log 2."""
    return s.to(gl.float32) * gl.expand_dims(factor, 1)


@gluon.jit
def weights_of(s, factor, base):
    """Weights of one half relative to ``base``: one multiply-add and one exponential each."""
    return gl.exp2(s.to(gl.float32) * gl.expand_dims(factor, 1) - gl.expand_dims(base, 1))


@gluon.jit
def first_logits(s0, s1, q_factor, scales, extras, at, masked, HALF: gl.constexpr):
    """Logits of both halves of a first tile, minus infinity for keys that do not count, and their maxima."""
    scale0, scale1 = load_scales(scales, at)
    x0, x1 = logits(s0, q_factor * scale0), logits(s1, q_factor * scale1)
    if masked != 0:
        extra = extras.index(at)
        ROW: gl.constexpr = gl.SliceLayout(0, HALF)
        x0 += gl.expand_dims(extra.slice(0, 64).load(ROW), 0)
        x1 += gl.expand_dims(extra.slice(64, 64).load(ROW), 0)
    return x0, x1, gl.maximum(gl.maximum(gl.max(x0, 1), gl.max(x1, 1)), -1.0e30)
