"""The producer warp of the 8-bit Hopper kernel: hands out jobs, fetches their tiles and the scales; see :mod:`.hopper8`.

Like :mod:`dit_accel_kernels.block_sparse.hopper_load`, with three differences: a scale travels with each half of a tile, so
block numbers are read two tiles ahead and scales one; keys come with the values of the tile before, which are needed at the
same time, so that consumers wait once a step; and no job is ever repeated.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from ..block_sparse.hopper_load import (
    _blocks,
    _claim,
    _claimed,
    _copy,
    _first,
    _program,
    _read_row,
    _wait_for_order,
    describe,
)
from ..block_sparse.hopper_steps import next_stage, split_job

__all__ = ["producer"]


@gluon.jit
def _pair(a, b):
    """Two scalars as a tensor of two."""
    o = gl.arange(0, 2, layout=gl.BlockedLayout([1], [32], [1], [0]))
    return gl.where(o == 0, a, b)


@gluon.jit
def _copy_values(desc_v, i_b, i_h, one, two, v_bufs, bar, stage, D: gl.constexpr, PARTS: gl.constexpr):
    """Fetch the values of one or two blocks; transposed ones as two tiles of 64 keys."""
    if desc_v.dtype.primitive_bitwidth == 8:
        at0, at1 = one * 128, one * 128 + 64
        if PARTS == 2:
            at0, at1 = one * 64, two * 64
        tma.async_copy_global_to_shared(desc_v, [i_b, i_h, 0, at0], bar, v_bufs.index(stage * 2))
        tma.async_copy_global_to_shared(desc_v, [i_b, i_h, 0, at1], bar, v_bufs.index(stage * 2 + 1))
    else:
        _copy(desc_v, i_b, i_h, one, two, v_bufs, bar, stage, D, PARTS)


@gluon.jit
def _copy_keys(desc_k, i_b, i_h, one, two, k_bufs, bar, stage, D: gl.constexpr, PARTS: gl.constexpr):
    """Fetch the keys of one or two blocks."""
    if PARTS == 1:
        tma.async_copy_global_to_shared(desc_k, [i_b, i_h, one * 128, 0], bar, k_bufs.index(stage))
    else:
        # The same bytes as pieces of 64 keys.
        pieces = k_bufs._reinterpret(desc_k.dtype, [k_bufs.shape[0] * 2, 1, 1, 64, D], desc_k.layout)
        tma.async_copy_global_to_shared(desc_k, [i_b, i_h, one * 64, 0], bar, pieces.index(stage * 2))
        tma.async_copy_global_to_shared(desc_k, [i_b, i_h, two * 64, 0], bar, pieces.index(stage * 2 + 1))


@gluon.jit
def _load_tile(
    desc_k, desc_v, i_b, i_h, one, two, scale_one, scale_two, extra, last, k_bufs, v_bufs, scales, extras, bars,
    stage, phase, biased, D: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fetch the keys of one or two blocks, and with them the values of the tile before: ``last``, -1 for none."""
    ready, empty = bars
    last_b, last_h, last_one, last_two, last_stage = last
    KEYS: gl.constexpr = 128 * D
    VALUES: gl.constexpr = 128 * D * (desc_v.dtype.primitive_bitwidth // 8)
    # All have done with the keys that were here, and with the values of the tile before them.
    mbarrier.wait(empty.index(stage), phase ^ 1)
    scales.index(stage).store(_pair(scale_one, scale_two))
    if biased:
        extras.index(stage).store(extra)
    gl.thread_barrier()
    bar = ready.index(stage)
    if last_b >= 0:
        mbarrier.expect(bar, KEYS + VALUES)
        _copy_values(desc_v, last_b, last_h, last_one, last_two, v_bufs, bar, last_stage, D, PARTS)
    else:
        mbarrier.expect(bar, KEYS)
    _copy_keys(desc_k, i_b, i_h, one, two, k_bufs, bar, stage, D, PARTS)
    after, after_phase = next_stage(stage, phase, STAGES)
    return (i_b, i_h, one, two, stage), after, after_phase


@gluon.jit
def _announce(
    desc_q, q_scale, q_bufs, q_scales, info, q_full, job, n, qb, heads, sq, PARTS: gl.constexpr, EVEN_K: gl.constexpr,
):  # fmt: skip
    """Tell the consumers their next job and its tiles, see :func:`.hopper8_steps.told`, and fetch queries and scales."""
    LINE: gl.constexpr = gl.BlockedLayout([4], [32], [1], [0])
    tiles = gl.maximum((n + (PARTS - 1)) // PARTS, 1)
    i_q, i_h, i_b = split_job(gl.maximum(job, 0), qb, heads)
    # Whether all keys of the first tile count: a whole block or two, the ragged one not among them.
    masked = 1
    if EVEN_K:
        masked = ((n == 0) | (n % PARTS != 0)).to(gl.int32)
    info.store(describe(job, tiles, 0, 0, i_q, i_h, i_b, masked))
    o_m = i_q * 128 + gl.arange(0, 128, layout=LINE)
    q_scales.store(gl.load(q_scale + ((i_b * heads + i_h).to(gl.int64) * sq + o_m), mask=o_m < sq, other=0.0))
    gl.thread_barrier()
    for w in gl.static_range(2):
        mbarrier.expect(q_full.index(w), desc_q.block_type.nbytes)
        tma.async_copy_global_to_shared(desc_q, [i_b, i_h, i_q * 128 + w * 64, 0], q_full.index(w), q_bufs.index(w))


@gluon.jit
def _scales_of(k_scale, one, two, kb, PARTS: gl.constexpr):
    """The scales of the two halves of a tile, 0 where there is no block."""
    a = gl.load(k_scale + one, mask=one < kb, other=0.0)
    if PARTS == 1:
        return a, a
    return a, gl.load(k_scale + two, mask=two < kb, other=0.0)


@gluon.jit
def producer(
    args, D: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, EVEN_K: gl.constexpr,
    HAS_PARTIAL: gl.constexpr,
):  # fmt: skip
    """Take jobs until there are none, and fetch their queries and tiles."""
    (
        desc_q, desc_k, desc_v, q_scale, k_scale, row_start, full, partial, indices, order, counter,
        sq, sk, qb, kb, heads, jobs, in_order, programs, list_b, list_h,
        q_bufs, q_scales, k_bufs, v_bufs, scales, extras, info, q_full, q_empty, bars,
    ) = args  # fmt: skip
    PARTS: gl.constexpr = 128 // BLOCK_K
    LINE: gl.constexpr = gl.BlockedLayout([4], [32], [1], [0])
    stage, phase, q_phase = 0, 0, 1
    last = (-1, 0, 0, 0, 0)
    job, begin, n_full, n = _read_row(
        row_start, full, partial, order, _program(jobs), jobs, in_order, qb, heads, list_b, list_h, HAS_PARTIAL
    )
    _announce(desc_q, q_scale, q_bufs, q_scales, info.index(0), q_full, job, n, qb, heads, sq, PARTS, EVEN_K)
    claim = 0
    while job != -1:
        _, i_h, i_b = split_job(gl.maximum(job, 0), qb, heads)
        ids = indices + begin.to(gl.int64)
        first = _first(indices, begin, n_full, n, kb, EVEN_K, HAS_PARTIAL)
        p_scale = k_scale + (i_b * heads + i_h) * kb
        one, two = _blocks(ids, n, first, 0, kb, PARTS)
        next_one, next_two = _blocks(ids, n, first, 1, kb, PARTS)
        scale_one, scale_two = _scales_of(p_scale, one, two, kb, PARTS)
        number, next_job, next_begin, next_full, next_n = jobs, 0, 0, 0, 0
        tiles = gl.maximum((n + (PARTS - 1)) // PARTS, 1)
        for t in range(tiles):
            extra = gl.full([128], 0.0, gl.float32, layout=LINE)
            if t == 0:
                o_k = gl.arange(0, 128, layout=LINE)
                token = o_k % BLOCK_K + BLOCK_K * gl.where(o_k < BLOCK_K, one, two)
                extra = gl.where(token < sk, 0.0, float("-inf"))
            later_one, later_two = _blocks(ids, n, first, t + 2, kb, PARTS)
            next_scale_one, next_scale_two = _scales_of(p_scale, next_one, next_two, kb, PARTS)
            last, stage, phase = _load_tile(
                desc_k, desc_v, i_b, i_h, one, two, scale_one, scale_two, extra, last, k_bufs, v_bufs, scales, extras,
                bars, stage, phase, t == 0, D, PARTS, STAGES,
            )  # fmt: skip
            one, two, scale_one, scale_two = next_one, next_two, next_scale_one, next_scale_two
            next_one, next_two = later_one, later_two
            # The next job is claimed late: one that is claimed during a long job waits for its end, though others are
            # idle. Each of these three reads takes about as long as a tile.
            if t == gl.maximum(tiles - 5, 0):
                _wait_for_order()
                claim = _claim(counter)
            if t == gl.maximum(tiles - 3, 0):
                number = programs + _claimed(claim)
                next_job, next_begin, next_full, next_n = _read_row(
                    row_start, full, partial, order, number, jobs, in_order, qb, heads, list_b, list_h, HAS_PARTIAL
                )
            # Its queries follow once those of this job have left their buffer.
            if t == gl.maximum(tiles - 2, gl.minimum(tiles - 1, STAGES)):
                for w in gl.static_range(2):
                    mbarrier.wait(q_empty.index(w), q_phase ^ 1)
                q_phase ^= 1
                if job == -2:
                    next_job = -1
                elif number >= jobs:
                    next_job, next_full, next_n = -2, 0, 0
                _announce(
                    desc_q, q_scale, q_bufs, q_scales, info.index(q_phase ^ 1), q_full, next_job, next_n, qb, heads, sq,
                    PARTS, EVEN_K,
                )  # fmt: skip
        job, begin, n_full, n = next_job, next_begin, next_full, next_n
