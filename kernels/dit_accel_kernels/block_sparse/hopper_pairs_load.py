"""The producer warp of the Hopper kernel for pairs of query blocks: which tiles a pair needs, and who takes them.

The tiles of a pair are, in this order: those that only one consumer takes, in turn for the first and the second one, as
long as both have any; those that both take; and what is left of the longer row. Pooled keys have biases of their own in
either row and are the first of the former. Which blocks these are has been written down before, in this order
(:mod:`.hopper_pairs_lists`). See :mod:`.hopper_pairs`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from .hopper_load import _claim, _claimed, _collect, _copy, _fetch_queries, _program, _wait_for_order, describe
from .hopper_steps import next_stage, split_job

__all__ = ["pairs_producer"]


@gluon.jit
def _read_pair(order, told, number, jobs, in_order, qb, heads, list_b, list_h):
    """Job number ``number`` and its rows: where they begin, their blocks of 64 keys, and how many they share."""
    there = number < jobs
    job = gl.load(order + number, mask=there & (number >= in_order), other=0)
    job = gl.where(number < in_order, number, job)
    i_q, i_h, i_b = split_job(job, qb, heads)
    at = told + (i_b * list_b + i_h * list_h + i_q) * 8
    first = gl.load(at, mask=there, other=0)
    n = gl.load(at + 1, mask=there, other=0)
    second = gl.load(at + 2, mask=there, other=0)
    m = gl.load(at + 3, mask=there, other=0)
    return job, first, n, second, m, gl.load(at + 4, mask=there, other=0)


@gluon.jit
def _shape(job, n, m, common, pooled, PARTS: gl.constexpr):
    """Tiles of a pair: in turn for either row, for both, and those that only the first or the second has more.

    And how many blocks the first private tile of either row lacks.
    """
    tiles = gl.maximum((n - common + (PARTS - 1)) // PARTS, 1)
    others = gl.maximum((m - common + (PARTS - 1)) // PARTS, 1)
    both = gl.minimum(tiles, others)
    # ``pooled`` keys are tiles of either row.
    turns = both + gl.where(job < 0, 0, pooled)
    gap, other_gap = PARTS * tiles - (n - common), PARTS * others - (m - common)
    return turns, common // PARTS, tiles - both, others - both, gap, other_gap


@gluon.jit
def _block(merged, y, r: gl.constexpr, first, n, second, gap, other_gap, until, kb, PARTS: gl.constexpr):
    """Block ``r`` of the pair's tile ``y``, pooled ones not counted, or ``kb`` for none; see :mod:`.hopper_pairs_lists`."""
    later = y >= 1
    place = PARTS * y + r - gap - gl.where(later, other_gap, 0)
    # Of the first two tiles, the first blocks may be none.
    least = gl.where(y == 0, gap, gl.where(y == 1, other_gap, 0))
    there = (y >= 0) & (y < until) & (r >= least)
    place = gl.where(place < n, first + place, second + (place - n))
    return gl.load(merged + place, mask=there, other=kb.to(gl.int16))


@gluon.jit
def _blocks(merged, y, first, n, second, gap, other_gap, until, kb, PARTS: gl.constexpr):
    """The one or two blocks of a tile."""
    one = _block(merged, y, 0, first, n, second, gap, other_gap, until, kb, PARTS)
    if PARTS == 1:
        return one, one
    return one, _block(merged, y, 1, first, n, second, gap, other_gap, until, kb, PARTS)


@gluon.jit
def _copy_tile(desc, i_b, i_h, one, two, bufs, bar, stage, D: gl.constexpr, PARTS: gl.constexpr):
    if PARTS == 1:
        tma.async_copy_global_to_shared(desc, [i_b, i_h, one * 64, 0], bar, bufs.index(stage))
    else:
        _copy(desc, i_b, i_h, one, two, bufs, bar, stage, D, PARTS)


@gluon.jit
def _pooled_bias(bias, bits, start, kb, inv_scale, TILE: gl.constexpr):
    """What is added to the pooled keys from ``start`` on; four of them are in one word."""
    KEYS: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [1, 1], [1, 0])
    o_4 = start + 4 * gl.arange(0, TILE // 4, layout=gl.SliceLayout(1, KEYS))
    word = gl.load(bits + o_4 // 32, mask=o_4 < kb, other=-1) >> (o_4 % 32)
    part = gl.expand_dims(gl.arange(0, 4, layout=gl.SliceLayout(0, KEYS)), 0)
    o_k = gl.expand_dims(o_4, 1) + part
    extra = gl.load(bias + o_k, mask=o_k < kb, other=float("-inf")) * inv_scale
    extra = gl.where(((gl.expand_dims(word, 1) >> part) & 1) == 0, extra, float("-inf"))
    return gl.convert_layout(extra.reshape([TILE]), gl.BlockedLayout([TILE // 32], [32], [1], [0]))


@gluon.jit
def _announce(
    desc_q, q_bufs, infos, slot, q_full, job, n, m, common, careful, pooled, qb, heads,
    PARTS: gl.constexpr, EVEN_K: gl.constexpr, HAS_POOLED: gl.constexpr, HAS_VALID: gl.constexpr,
    gather, D: gl.constexpr, DIM: gl.constexpr, GATHER: gl.constexpr, FETCHED: gl.constexpr,
):  # fmt: skip
    """Tell each consumer its next job: its tiles and where they lie among those of the pair; and fetch its queries."""
    turns, shared, more, others_more, _, _ = _shape(job, n, m, common, pooled, PARTS)
    i_q, i_h, i_b = split_job(gl.maximum(job, 0), qb, heads)
    for w in gl.static_range(2):
        size = m if w else n
        mine = others_more if w else more
        # Tiles behind the last one that is mine.
        behind = more if w else others_more + ((shared == 0) & (more == 0)).to(gl.int32)
        tiles = turns + shared + mine
        n_biased = tiles if HAS_VALID else 1
        if HAS_POOLED and not HAS_VALID:
            n_biased += gl.where(job < 0, 0, pooled)
        masked = 1
        if EVEN_K and not HAS_POOLED and not HAS_VALID:
            masked = ((size == 0) | ((size - common) % PARTS != 0)).to(gl.int32)
        alone = careful | (size == 0).to(gl.int32)
        infos[w].index(slot).store(
            describe(job, n_biased, tiles - n_biased, alone + 2 * masked, i_q, i_h, i_b, turns - w + behind * 65536)
        )
    gl.thread_barrier()
    for w in gl.static_range(2):
        if FETCHED:
            _fetch_queries(gather, q_bufs.index(w).reshape([64, D]), q_full.index(w), i_q, i_h, i_b, w, D, DIM)
        elif GATHER:
            mbarrier.arrive(q_full.index(w), count=1)
        else:
            mbarrier.expect(q_full.index(w), desc_q.block_type.nbytes)
            tma.async_copy_global_to_shared(desc_q, [i_b, i_h, i_q * 128 + w * 64, 0], q_full.index(w), q_bufs.index(w))


@gluon.jit
def pairs_producer(
    args, D: gl.constexpr, DIM: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr, EVEN_K: gl.constexpr,
    HAS_POOLED: gl.constexpr, HAS_VALID: gl.constexpr, GATHER: gl.constexpr, FAST: gl.constexpr,
    FETCHED: gl.constexpr,
):  # fmt: skip
    """Take jobs until there are none, and fetch their queries and tiles."""
    (
        desc_q, desc_k, desc_v, desc_pk, desc_pv, merged, told, order, counter, again,
        bias, bits, valid, inv_scale, sk, words, rows, qb, kb, pooled_keys, heads, jobs, in_order, programs,
        list_b, list_h, bits_b, bits_h, bias_b, bias_h,
        q, table, head_row, tokens, table_s, q_b, q_h, q_s,
        q_bufs, k_bufs, v_bufs, extras, infos, failed, q_full, q_empty, bars,
    ) = args  # fmt: skip
    k_full, v_full, empty = bars
    PARTS: gl.constexpr = TILE // 64
    EARLY: gl.constexpr = 4 if FETCHED else 0
    BYTES: gl.constexpr = TILE * D * 2
    LINE: gl.constexpr = gl.BlockedLayout([TILE // 32], [32], [1], [0])
    gather = (q, table, head_row, tokens, table_s, q_b, q_h, q_s)
    pooled = 0
    if HAS_POOLED:
        pooled = (pooled_keys + (TILE - 1)) // TILE
    stage, phase, q_phase, careful, head, claim = 0, 0, 1, 0, -1, 0
    _wait_for_order()
    job, first, n, second, m, common = _read_pair(
        order, told, _program(jobs), jobs, in_order, qb, heads, list_b, list_h
    )
    _announce(
        desc_q, q_bufs, infos, 0, q_full, job, n, m, common, careful, pooled, qb, heads,
        PARTS, EVEN_K, HAS_POOLED, HAS_VALID, gather, D, DIM, GATHER, FETCHED,
    )  # fmt: skip
    while job != -1:
        i_q, i_h, i_b = split_job(gl.maximum(job, 0), qb, heads)
        turns, shared, more, others_more, gap, other_gap = _shape(job, n, m, common, pooled, PARTS)
        last = 2 * turns + shared + more + others_more
        number, next_job, next_first, next_n, next_second, next_m, next_common = jobs, 0, 0, 0, 0, 0, 0
        # Tiles before those of the lists.
        before = 0
        if HAS_POOLED:
            before = gl.where(job < 0, 0, 2 * pooled)
        next_one, next_two = _blocks(merged, 0 - before, first, n, second, gap, other_gap, last - before, kb, PARTS)
        for x in range(last):
            y = x - before
            one, two = next_one.to(gl.int32), next_two.to(gl.int32)
            extra = gl.full([TILE], 0.0, gl.float32, layout=LINE)
            biased = (y >= 0) & (y < 2)
            if HAS_VALID:
                biased = y >= 0
            if biased:
                o_k = gl.arange(0, TILE, layout=LINE)
                token = o_k % 64 + 64 * gl.where(o_k < 64, one, two)
                here = token < sk
                if HAS_VALID:
                    here = here & (gl.load(valid + (i_b.to(gl.int64) * sk + token), mask=here, other=0) != 0)
                extra = gl.where(here, 0.0, float("-inf"))
            if HAS_POOLED:
                if y < 0:
                    row = gl.minimum(2 * i_q + (x & 1), rows - 1)
                    extra = _pooled_bias(
                        bias + (i_b * bias_b + i_h * bias_h), bits + (i_b * bits_b + i_h * bits_h + row * words),
                        x // 2 * TILE, pooled_keys, inv_scale, TILE,
                    )  # fmt: skip
                biased = biased | (y < 0)
            next_one, next_two = _blocks(merged, y + 1, first, n, second, gap, other_gap, last - before, kb, PARTS)
            after, after_phase = next_stage(stage, phase, STAGES)
            mbarrier.wait(empty.index(stage), phase ^ 1)
            if biased:
                extras.index(stage).store(extra)
            gl.thread_barrier()
            mbarrier.expect(k_full.index(stage), BYTES)
            if HAS_POOLED and y < 0:
                start = x // 2 * TILE
                tma.async_copy_global_to_shared(desc_pk, [i_b, i_h, start, 0], k_full.index(stage), k_bufs.index(stage))
            else:
                _copy_tile(desc_k, i_b, i_h, one, two, k_bufs, k_full.index(stage), stage, D, PARTS)
            # The values that were here are done with when the tile after them is given back.
            mbarrier.wait(empty.index(after), after_phase ^ 1)
            mbarrier.expect(v_full.index(stage), BYTES)
            if HAS_POOLED and y < 0:
                start = x // 2 * TILE
                tma.async_copy_global_to_shared(desc_pv, [i_b, i_h, start, 0], v_full.index(stage), v_bufs.index(stage))
            else:
                _copy_tile(desc_v, i_b, i_h, one, two, v_bufs, v_full.index(stage), stage, D, PARTS)
            stage, phase = after, after_phase
            # The next job is claimed late, see hopper_load.
            if x == gl.maximum(last - 10 - EARLY, 0):
                claim = _claim(counter)
            if x == gl.maximum(last - 7 - EARLY, 0):
                number = programs + _claimed(claim)
                next_job, next_first, next_n, next_second, next_m, next_common = _read_pair(
                    order, told, number, jobs, in_order, qb, heads, list_b, list_h
                )
            # Its queries follow once those of this job have left their buffer.
            if x == gl.maximum(last - 4 - EARLY, gl.minimum(last - 1, 8)):
                for w in gl.static_range(2):
                    mbarrier.wait(q_empty.index(w), q_phase ^ 1)
                q_phase ^= 1
                if FAST:
                    head = _collect(failed[0].index(q_phase ^ 1), again, head)
                if job == -2:
                    # The job before has been finished: now it is known what must be repeated.
                    careful = 1
                    next_job = -1
                elif (careful != 0) | (number >= jobs):
                    next_job, next_n, next_m, next_common = -2, 0, 0, 0
                if FAST:  # noqa: SIM102
                    if (careful != 0) & (head >= 0):
                        next_job, next_first, next_n, next_second, next_m, next_common = _read_pair(
                            order, told, head, jobs, jobs, qb, heads, list_b, list_h
                        )
                        head = gl.load(again + head)
                _announce(
                    desc_q, q_bufs, infos, q_phase ^ 1, q_full, next_job, next_n, next_m, next_common, careful,
                    pooled, qb, heads, PARTS, EVEN_K, HAS_POOLED, HAS_VALID, gather, D, DIM, GATHER, FETCHED,
                )  # fmt: skip
        job, first, n, second, m, common = next_job, next_first, next_n, next_second, next_m, next_common
