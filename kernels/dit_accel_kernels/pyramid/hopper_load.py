"""The producer of the Hopper kernel with gathered keys: four warps that use TMA for blocks and ``cp.async`` for rows.

A *gathered tile* is 128 entries of a list of keys, of any group size. Its rows go to where TMA would have put them, in
copies of 16 bytes of which each thread makes 32; the L2 cache serves rows of 256 bytes (128 at head size 64) as well as
boxes of TMA. Rows of keys that nobody sees are filled with 0 and never read. See :mod:`.hopper`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from ..block_sparse.hopper_load import _blocks, _copy, _first, _program, _read_row, describe
from ..block_sparse.hopper_steps import next_stage, split_job

__all__ = ["producer"]


@gluon.jit
def _claim(counter):
    """Add 1 to the counter; only the first thread gets the number, and nobody waits for it before :func:`_claimed`."""
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    at = gl.zeros([128], gl.int64, layout=LINE) + counter.to(gl.int64)
    return gl.inline_asm_elementwise(
        """{
        .reg .pred first;
        setp.eq.u32 first, $2, 0; mov.u32 $0, 0;
        @first atom.global.add.u32 $0, [$1], 1;
        }""",
        "=r,l,r", [at, gl.arange(0, 128, layout=LINE)], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _read_more(more_start, more_count, job, qb, heads, list_b, list_h, GROUP: gl.constexpr):
    """The list of a job's gathered groups: where it starts and how many keys it has; none for a job without a number."""
    i_q, i_h, i_b = split_job(gl.maximum(job, 0), qb, heads)
    i_row = i_b * list_b + i_h * list_h + i_q
    begin = gl.load(more_start + i_row, mask=job >= 0, other=0)
    return begin, gl.load(more_count + i_row, mask=job >= 0, other=0) * GROUP


@gluon.jit
def _groups(ids, tile, n, GROUP: gl.constexpr):
    """Groups of the rows of a gathered tile, -1 behind the end of the list: one a thread."""
    o = tile * 128 + gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
    return gl.load(ids + o // GROUP, mask=o < n, other=-1)


@gluon.jit
def _rows(bias, group, se, step, GROUP: gl.constexpr):
    """Where the rows of a gathered tile begin, in units of 8 elements, and their biases: minus infinity for none."""
    row = group * GROUP + gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0])) % GROUP
    return row * step, gl.load(bias + row, mask=(group >= 0) & (row < se), other=float("-inf"))


@gluon.jit
def _tell_rows(row, extra, inv_scale, rows, extras):
    """Put the rows of a tile where all threads see them, -1 for one that nobody sees, and what is added for consumers."""
    extras.store(extra * inv_scale)
    rows.store(gl.where(extra > float("-inf"), row, -1))
    gl.thread_barrier()


@gluon.jit
def _copy_rows(x, rows, bufs, stage, D: gl.constexpr, DIM: gl.constexpr):
    """Ask for the listed rows of ``x``, and for zeros where there is none: nothing is read at their addresses."""
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    PART: gl.constexpr = 64
    tile = bufs.index(stage).reshape([128, D])
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, ROWS))
    p_x = gl.expand_dims(x + o_d, 0)
    for i in gl.static_range(128 // PART):
        at = gl.expand_dims(rows.slice(i * PART, PART).load(gl.SliceLayout(1, ROWS)), 1)
        there = at >= 0
        if DIM < D:
            there = there & gl.expand_dims(o_d < DIM, 0)
        async_copy.async_copy_global_to_shared(tile.slice(i * PART, PART), p_x + at.to(gl.int64) * 8, mask=there)


@gluon.jit
def _arrived(count: gl.constexpr):
    """Wait until all but ``count`` groups of this partition's copies are in shared memory, for wgmma to read."""
    async_copy.wait_group(count)
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def _stage_before(stage, STAGES: gl.constexpr):
    """Computed, not carried: a variable that starts as another one's alias is none of the loop's to the compiler."""
    return gl.where(stage == 0, STAGES - 1, stage - 1)


@gluon.jit
def _gathered_tiles(
    k, v, bias, ids, n, begin, end, se, step, inv_scale, rows, k_bufs, v_bufs, extras, bars, stage, phase,
    D: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Fill stages with the tiles from ``begin`` to ``end`` of a list of ``n`` keys.

    The values of a tile and the keys of the next one wait for the same buffer, so they are one group of copies. A group is
    waited for once the next one is under way: a whole step of the consumers later, and a step before they need it. Numbers
    of groups are loaded two tiles ahead, biases one.
    """
    k_full, v_full, empty = bars
    tiles = end - begin
    group = _groups(ids, begin, n, GROUP)
    next_group = _groups(ids, begin + 1, n, GROUP)
    row, extra = _rows(bias, group, se, step, GROUP)
    if tiles > 0:
        mbarrier.wait(empty.index(stage), phase ^ 1)
        _tell_rows(row, extra, inv_scale, rows, extras.index(stage))
        _copy_rows(k, rows, k_bufs, stage, D, DIM)
        async_copy.commit_group()
    row, extra = _rows(bias, next_group, se, step, GROUP)
    group = _groups(ids, begin + 2, n, GROUP)
    for t in range(tiles):
        after, after_phase = next_stage(stage, phase, STAGES)
        mbarrier.wait(empty.index(after), after_phase ^ 1)
        _copy_rows(v, rows, v_bufs, stage, D, DIM)
        gl.thread_barrier()
        if t + 1 < tiles:
            _tell_rows(row, extra, inv_scale, rows, extras.index(after))
            _copy_rows(k, rows, k_bufs, after, D, DIM)
        async_copy.commit_group()
        _arrived(1)
        mbarrier.arrive(k_full.index(stage), count=1)
        mbarrier.arrive(v_full.index(_stage_before(stage, STAGES)), count=1, pred=t > 0)
        row, extra = _rows(bias, group, se, step, GROUP)
        group = _groups(ids, begin + t + 3, n, GROUP)
        stage, phase = after, after_phase
    if tiles > 0:
        _arrived(0)
        mbarrier.arrive(v_full.index(_stage_before(stage, STAGES)), count=1)
    return stage, phase


@gluon.jit
def _load_tile(
    desc_k, desc_v, i_b, i_h, one, two, extra, k_bufs, v_bufs, extras, bars, stage, phase, biased,
    D: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fill one stage of the rings with the keys and values of one or two blocks.

    All warps have seen a buffer empty before it is filled: none may wait for a phase that has come and gone.
    """
    k_full, v_full, empty = bars
    BYTES: gl.constexpr = 128 * D * 2
    after, after_phase = next_stage(stage, phase, STAGES)
    mbarrier.wait(empty.index(stage), phase ^ 1)
    if biased:
        extras.index(stage).store(extra)
    gl.thread_barrier()
    mbarrier.expect(k_full.index(stage), BYTES)
    _copy(desc_k, i_b, i_h, one, two, k_bufs, k_full.index(stage), stage, D, PARTS)
    mbarrier.wait(empty.index(after), after_phase ^ 1)
    gl.thread_barrier()
    mbarrier.expect(v_full.index(stage), BYTES)
    _copy(desc_v, i_b, i_h, one, two, v_bufs, v_full.index(stage), stage, D, PARTS)
    return after, after_phase


@gluon.jit
def _collect(failed, again, head):
    """Put the job whose output the consumers have just written on the list of those to repeat if it must."""
    LINE: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])
    job = gl.max(failed.slice(0, 2).load(LINE), 0)
    gl.thread_barrier()
    if job >= 0:
        gl.store(again + job, head)
        head = job
        failed.slice(0, 2).store(gl.full([2], -1, gl.int32, LINE))
        gl.thread_barrier()
    return head


@gluon.jit
def _even_tiles(n, even, HAS_VALID: gl.constexpr):
    """Gathered tiles of ``n`` keys without a bias: where no key has one, all but the last, which may lack keys."""
    if HAS_VALID:
        return 0
    return gl.where(even, gl.maximum((n + 127) // 128 - 1, 0), 0)


@gluon.jit
def _announce(
    desc_q, q_bufs, info, q_full, job, n, n_more, even, careful, qb, kb, heads,
    PARTS: gl.constexpr, HAS_POOLED: gl.constexpr, HAS_VALID: gl.constexpr, GATHER: gl.constexpr,
):  # fmt: skip
    """Tell the consumers their next job, its biased and its plain tiles, and fetch its queries."""
    tiles = gl.maximum((n + (PARTS - 1)) // PARTS, 1)
    n_biased = tiles if HAS_VALID else 1
    n_plain = tiles - n_biased
    n_even = _even_tiles(n_more, even, HAS_VALID)
    n_biased += (n_more + 127) // 128 - n_even
    n_plain += n_even
    if HAS_POOLED:
        n_biased += gl.where(job < 0, 0, (kb + 127) // 128)
    i_q, i_h, i_b = split_job(gl.maximum(job, 0), qb, heads)
    careful |= ((n == 0) & (n_more == 0)).to(gl.int32)
    info.store(describe(job, n_biased, n_plain, careful, i_q, i_h, i_b, 1, 4))
    gl.thread_barrier()
    for w in gl.static_range(2):
        if GATHER:
            mbarrier.arrive(q_full.index(w), count=1)
        else:
            mbarrier.expect(q_full.index(w), desc_q.block_type.nbytes)
            tma.async_copy_global_to_shared(desc_q, [i_b, i_h, i_q * 128 + w * 64, 0], q_full.index(w), q_bufs.index(w))


@gluon.jit
def producer(
    args, D: gl.constexpr, DIM: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, EVEN_K: gl.constexpr,
    HAS_PARTIAL: gl.constexpr, HAS_POOLED: gl.constexpr, HAS_VALID: gl.constexpr, GATHER: gl.constexpr,
    FAST: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Take jobs until there are none, and fetch their queries and tiles: gathered ones, pooled ones, listed blocks."""
    (
        desc_q, desc_k, desc_v, desc_pk, desc_pv, row_start, full, partial, indices, order, counter, again,
        bias, bits, valid, inv_scale, sk, words, qb, kb, heads, jobs, in_order, programs,
        list_b, list_h, bits_b, bits_h, bias_b, bias_h,
        more_k, more_v, more_bias, more_biased, more_start, more_count, more_indices, se,
        more_s, more_k_b, more_k_h, more_v_b, more_v_h,
        more_list_b, more_list_h, more_bias_b, more_bias_h, rows,
        q_bufs, k_bufs, v_bufs, extras, info, failed, q_full, q_empty, bars,
    ) = args  # fmt: skip
    PARTS: gl.constexpr = 128 // BLOCK_K
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    stage, phase, q_phase, careful, head = 0, 0, 1, 0, -1
    even = gl.load(more_biased) == 0
    job, begin, n_full, n = _read_row(
        row_start, full, partial, order, _program(jobs), jobs, in_order, qb, heads, list_b, list_h, HAS_PARTIAL
    )
    more_begin, n_more = _read_more(more_start, more_count, job, qb, heads, more_list_b, more_list_h, GROUP)
    _announce(
        desc_q, q_bufs, info.index(0), q_full, job, n, n_more, even, careful, qb, kb, heads,
        PARTS, HAS_POOLED, HAS_VALID, GATHER,
    )  # fmt: skip
    first = _first(indices, begin, n_full, n, kb, EVEN_K, HAS_PARTIAL)
    one, two = _blocks(indices + begin.to(gl.int64), n, first, 0, kb, PARTS)
    claim = gl.full([128], 0, gl.int32, layout=LINE)
    while job != -1:
        i_q, i_h, i_b = split_job(gl.maximum(job, 0), qb, heads)
        tiles = gl.maximum((n + (PARTS - 1)) // PARTS, 1)
        # The next job is claimed late, see the producer without gathered keys; short lists leave no time for that.
        if tiles <= 5:
            claim = _claim(counter)
        w_b, w_h = i_b.to(gl.int64), i_h.to(gl.int64)
        at_k = more_k + (w_b * more_k_b + w_h * more_k_h) * 8
        at_v = more_v + (w_b * more_v_b + w_h * more_v_h) * 8
        at_bias = more_bias + (i_b * more_bias_b + i_h * more_bias_h)
        more_ids = more_indices + more_begin.to(gl.int64)
        n_even = _even_tiles(n_more, even, HAS_VALID)
        stage, phase = _gathered_tiles(
            at_k, at_v, at_bias, more_ids, n_more, n_even, (n_more + 127) // 128, se, more_s, inv_scale, rows,
            k_bufs, v_bufs, extras, bars, stage, phase, D, DIM, STAGES, GROUP,
        )  # fmt: skip
        ids = indices + begin.to(gl.int64)
        if HAS_POOLED:
            p_bias = bias + (i_b * bias_b + i_h * bias_h)
            p_bits = bits + (i_b * bits_b + i_h * bits_h + i_q * words)
            for start in range(0, gl.where(job < 0, 0, kb), 128):
                o_k = start + gl.arange(0, 128, layout=LINE)
                word = gl.load(p_bits + o_k // 32, mask=o_k < kb, other=-1)
                extra = gl.load(p_bias + o_k, mask=o_k < kb, other=float("-inf")) * inv_scale
                extra = gl.where(((word >> (o_k % 32)) & 1) == 0, extra, float("-inf"))
                stage, phase = _load_tile(
                    desc_pk, desc_pv, i_b, i_h, start // 128, 0, extra, k_bufs, v_bufs, extras, bars, stage, phase,
                    True, D, 1, STAGES,
                )  # fmt: skip
        number, next_job, next_begin, next_full, next_n = jobs, 0, 0, 0, 0
        next_more_begin, next_n_more = 0, 0
        next_one, next_two = kb, kb
        for t in range(tiles):
            extra = gl.full([128], 0.0, gl.float32, layout=LINE)
            if HAS_VALID or t == 0:
                o_k = gl.arange(0, 128, layout=LINE)
                token = o_k % BLOCK_K + BLOCK_K * gl.where(o_k < BLOCK_K, one, two)
                here = token < sk
                if HAS_VALID:
                    here = here & (gl.load(valid + (i_b.to(gl.int64) * sk + token), mask=here, other=0) != 0)
                extra = gl.where(here, 0.0, float("-inf"))
            if t + 1 < tiles:
                next_one, next_two = _blocks(ids, n, first, t + 1, kb, PARTS)
            stage, phase = _load_tile(
                desc_k, desc_v, i_b, i_h, one, two, extra, k_bufs, v_bufs, extras, bars, stage, phase,
                HAS_VALID or t == 0, D, PARTS, STAGES,
            )  # fmt: skip
            one, two = next_one, next_two
            if not HAS_VALID and t == 0:
                stage, phase = _gathered_tiles(
                    at_k, at_v, at_bias, more_ids, n_more, 0, n_even, se, more_s, inv_scale, rows,
                    k_bufs, v_bufs, extras, bars, stage, phase, D, DIM, STAGES, GROUP,
                )  # fmt: skip
            if (tiles > 5) & (t == tiles - 5):
                claim = _claim(counter)
            if t == gl.maximum(tiles - 3, 0):
                number = programs + gl.sum(claim, 0)
                next_job, next_begin, next_full, next_n = _read_row(
                    row_start, full, partial, order, number, jobs, in_order, qb, heads, list_b, list_h, HAS_PARTIAL
                )
                next_more_begin, next_n_more = _read_more(
                    more_start, more_count, next_job, qb, heads, more_list_b, more_list_h, GROUP
                )
            # Its queries follow once those of this job have left their buffer.
            if t == gl.maximum(tiles - 2, gl.minimum(tiles - 1, STAGES + 1)):
                for w in gl.static_range(2):
                    mbarrier.wait(q_empty.index(w), q_phase ^ 1)
                gl.thread_barrier()
                q_phase ^= 1
                if FAST:
                    head = _collect(failed, again, head)
                if job == -2:
                    # The job before has been finished: now it is known what must be repeated.
                    careful = 1
                    next_job = -1
                elif (careful != 0) | (number >= jobs):
                    next_job, next_full, next_n, next_n_more = -2, 0, 0, 0
                if FAST:  # noqa: SIM102
                    if (careful != 0) & (head >= 0):
                        next_job, next_begin, next_full, next_n = _read_row(
                            row_start, full, partial, order, head, jobs, jobs, qb, heads, list_b, list_h, HAS_PARTIAL
                        )
                        next_more_begin, next_n_more = _read_more(
                            more_start, more_count, next_job, qb, heads, more_list_b, more_list_h, GROUP
                        )
                        head = gl.load(again + head)
                _announce(
                    desc_q, q_bufs, info.index(q_phase ^ 1), q_full, next_job, next_n, next_n_more, even, careful, qb, kb,
                    heads, PARTS, HAS_POOLED, HAS_VALID, GATHER,
                )  # fmt: skip
        job, begin, n_full, n = next_job, next_begin, next_full, next_n
        more_begin, n_more = next_more_begin, next_n_more
        first = _first(indices, begin, n_full, n, kb, EVEN_K, HAS_PARTIAL)
        one, two = _blocks(indices + begin.to(gl.int64), n, first, 0, kb, PARTS)  # type: ignore[attr-defined]
