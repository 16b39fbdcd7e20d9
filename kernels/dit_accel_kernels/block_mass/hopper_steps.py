"""What one consumer of the block-mass kernel does with one tile: the product, exponentials, and sums of each lane.

The special-function unit takes 16 exponentials a clock and multiprocessor. Where head sizes are so small that it, and not
the product, is what a tile waits for, a quarter of the exponentials are polynomials on the FMA units, wrong by 7.5e-5 at
most. For ``2^t``, ``u`` is ``(t + 127) / 255`` held within 0 and 1 by the instruction that computes it,
and ``1 + u 255 / 256`` is a number whose last 23 bits are ``t + 127`` with 15 bits behind the point. Shifted left by eight
they are sign, exponent and mantissa of a float: a negative one, as the last bit of the exponent becomes the sign, with the
power of two of ``t``, and a mantissa ``m`` of which ``2^t`` is that power times a polynomial (whose coefficients are
negative, too). Below ``2^-126`` it is 0, from ``2^128`` on infinite. ``t`` that is not a number counts as 0: but of each
column that a lane holds only one of two rows is a polynomial, and of each row half of the columns, so that the sums are not
a number if a key or a query has a component that is none.
"""

from __future__ import annotations

import struct

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from ..block_sparse.hopper_steps import next_stage, release

__all__ = ["tile"]

# 2^(m - 1) for m in [1, 2], from the highest power down; minimax in relative error.
_POLYNOMIAL = (0.07802454469840976, -0.008006456784854071, 0.4777727830084514, 0.45213435462234897)
_PER_LANE = 4  # columns 2i and 2i + 1 of row r, then of row r + 8: what a lane holds of each 8 columns
_BY_POLYNOMIAL = 1  # the second of them


def _bits(x: float) -> str:
    return f"0f{struct.unpack('<I', struct.pack('<f', x))[0]:08X}"


def _exponentials() -> str:
    """Assembly for four weights: logits, shifts, shifts for the polynomial, scale, scale for the polynomial."""
    lines = ["{ .reg .f32 t, m, p; .reg .b32 y, z;"]
    for i in range(_PER_LANE):
        logit, shift, shift_p, scale, scale_p = (f"${i + _PER_LANE * n}" for n in range(1, 6))
        if i != _BY_POLYNOMIAL:
            lines.append(f"fma.rn.ftz.f32 t, {logit}, {scale}, {shift}; ex2.approx.ftz.f32 ${i}, t;")
            continue
        first, *rest = (_bits(-x) for x in _POLYNOMIAL)
        lines += [
            f"fma.rn.ftz.sat.f32 t, {logit}, {scale_p}, {shift_p};",
            f"fma.rn.f32 t, t, {_bits(255 / 256)}, {_bits(1.0)};",
            "mov.b32 y, t; shl.b32 y, y, 8; lop3.b32 z, y, 0x007FFFFF, 0x3F800000, 0xEA; mov.b32 m, z;",
            f"and.b32 y, y, 0xFF800000; mov.b32 t, y; mov.f32 p, {first};",
            *(f"fma.rn.ftz.f32 p, p, m, {x};" for x in rest),
            f"mul.f32 ${i}, t, p;",  # not .ftz: ptxas makes it one with the addition to a sum
        ]
    return " ".join([*lines, "}"])


_ASM = gl.constexpr(_exponentials())
_OPERANDS = gl.constexpr(",".join(["=f"] * _PER_LANE + ["f"] * (5 * _PER_LANE)))


@gluon.jit
def _lane_sums(
    s, shift, scale2, extras, stage, MASKED: gl.constexpr, PER: gl.constexpr, POLYNOMIALS: gl.constexpr
):  # fmt: skip
    """What each lane holds of the mass of PER blocks: float32 ``[PER, 128]``, 32 lanes for every 16 rows."""
    shifts = gl.expand_dims(shift, 1)
    if POLYNOMIALS:
        arguments = [s, shifts, (shifts + 127.0) * (1 / 255), scale2, scale2 * (1 / 255)]
        weights = gl.inline_asm_elementwise(_ASM, _OPERANDS, arguments, dtype=gl.float32, is_pure=True, pack=4)
    else:
        weights = gl.exp2(s * scale2 + shifts)
    if MASKED:
        counts = extras.index(stage).load(gl.SliceLayout(0, s.type.layout))
        weights = gl.where(gl.expand_dims(counts, 0) > 0.0, weights, 0.0)
    # Keys 8b + 2i + j of a block lie with lane i of four, rows r and r + 8 of 16 with the same lanes.
    x = weights.reshape([4, 2, 8, PER, 16 // PER, 4, 2])
    x = gl.sum(gl.sum(gl.sum(x, 6), 4), 1)  # [4, 8, PER, 4]
    return x.permute([2, 0, 1, 3]).reshape([PER, 128])


@gluon.jit
def tile(
    q_tile, shift, scale2, k_bufs, extras, parts, bars, stage, phase, group, group_phase, i, count,
    i_w: gl.constexpr, S_LAYOUT: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
    PER: gl.constexpr, MASKED: gl.constexpr, POLYNOMIALS: gl.constexpr,
):  # fmt: skip
    """Weigh 64 queries against tile ``i`` of ``count`` of a job."""
    k_full, k_empty, p_full, p_empty = bars
    place = i % GROUP
    mbarrier.wait(k_full.index(stage), phase)
    k_tile = k_bufs.index(stage).reshape([128, D]).permute([1, 0])
    s = gl.zeros([64, 128], gl.float32, layout=S_LAYOUT)
    s = warpgroup_mma(q_tile, k_tile, s, use_acc=False, is_async=True)
    if place == 0:
        mbarrier.wait(p_empty.index(group), group_phase ^ 1)
    s = warpgroup_mma_wait(0, deps=[s])
    if not MASKED:
        release(k_empty.index(stage))
    x = _lane_sums(s, shift, scale2, extras, stage, MASKED, PER, POLYNOMIALS)
    parts.index((group * GROUP + place) * 4 + i_w).store(x)
    if MASKED:
        release(k_empty.index(stage))
    if (place == GROUP - 1) | (i == count - 1):
        release(p_full.index(group))
        group, group_phase = next_stage(group, group_phase, 2)
    stage, phase = next_stage(stage, phase, STAGES)
    return stage, phase, group, group_phase
