"""The producer warp of the Hopper kernel for short lists; see :mod:`.hopper_short`.

What a tile is, and what ``extras`` says, is in :mod:`.hopper_load`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from .hopper_load import (
    _blocks,
    _first,
    _load_tile,
    _program,
    _read_row,
    _wait_for_order,
    claim_next,
    claimed_of,
    describe,
    enter,
)
from .hopper_steps import on_the_spot, split_job

__all__ = ["producer"]


@gluon.jit
def _announce(
    desc_q, q_bufs, info, q_full, job, n, careful, qb, heads, PARTS: gl.constexpr, EVEN_K: gl.constexpr
):  # fmt: skip
    """Tell the consumers their next job and how many tiles follow its first, and fetch its queries if it is one."""
    tiles = gl.maximum((n + (PARTS - 1)) // PARTS, 1)
    i_q, i_h, i_b = split_job(gl.maximum(job, 0), qb, heads)
    # Whether all keys of the first tile count: a whole block or two, the ragged one not among them.
    masked = 1
    if EVEN_K:
        masked = ((n == 0) | (n % PARTS != 0)).to(gl.int32)
    info.store(describe(job, 1, tiles - 1, careful | (n == 0).to(gl.int32), i_q, i_h, i_b, masked))
    gl.thread_barrier()
    for w in gl.static_range(2):
        if job >= 0:
            mbarrier.expect(q_full.index(w), desc_q.block_type.nbytes)
            tma.async_copy_global_to_shared(desc_q, [i_b, i_h, i_q * 128 + w * 64, 0], q_full.index(w), q_bufs.index(w))
        else:
            mbarrier.arrive(q_full.index(w), count=1)


@gluon.jit
def _collect(failed, again, head, job):
    """Put a job on the list of those to repeat if any of its rows is wrong."""
    if gl.max(failed.load(gl.BlockedLayout([4], [32], [1], [0])).to(gl.int32), 0) != 0:
        gl.store(again + job, head)
        gl.thread_barrier()
        head = job
    return head


@gluon.jit
def producer(
    args, D: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, EVEN_K: gl.constexpr,
    HAS_PARTIAL: gl.constexpr, CLAIM: gl.constexpr,
):  # fmt: skip
    """Take jobs until there are none, and fetch their queries and tiles."""
    (
        desc_q, desc_k, desc_v, row_start, full, partial, indices, order, counter, again, sk, qb, kb, heads, jobs,
        in_order, programs, alone, list_b, list_h,
        q_bufs, k_bufs, v_bufs, extras, info, failed, q_full, q_empty, bars, checked,
    ) = args  # fmt: skip
    PARTS: gl.constexpr = 128 // BLOCK_K
    LINE: gl.constexpr = gl.BlockedLayout([4], [32], [1], [0])
    stage, phase, q_phase, careful, head, before = 0, 0, 0, 0, -1, 0
    enter(counter, alone)
    number = _program(jobs)
    job, begin, n_full, n = _read_row(
        row_start, full, partial, order, number, jobs, in_order, qb, heads, list_b, list_h, HAS_PARTIAL
    )
    _announce(desc_q, q_bufs, info.index(0), q_full, job, n, careful, qb, heads, PARTS, EVEN_K)
    first = _first(indices, begin, n_full, n, kb, EVEN_K, HAS_PARTIAL)
    one, two = _blocks(indices + begin.to(gl.int64), n, first, 0, kb, PARTS)
    while job >= 0:
        _, i_h, i_b = split_job(job, qb, heads)
        next_job, next_begin, next_full, next_n, next_first = 0, 0, 0, 0, 0
        next_one, next_two, far_one, far_two, claim = kb, kb, kb, kb, 0
        tiles = gl.maximum((n + (PARTS - 1)) // PARTS, 1)
        for t in range(tiles):
            extra = gl.full([128], 0.0, gl.float32, layout=LINE)
            if t == 0:
                o_k = gl.arange(0, 128, layout=LINE)
                token = o_k % BLOCK_K + BLOCK_K * gl.where(o_k < BLOCK_K, one, two)
                extra = gl.where(token < sk, 0.0, float("-inf"))
            if t + 1 < tiles:
                ids = indices + on_the_spot(begin).to(gl.int64)
                next_one, next_two = _blocks(ids, n, first, t + 1, kb, PARTS)
            stage, phase = _load_tile(
                desc_k, desc_v, i_b, i_h, one, two, extra, k_bufs, v_bufs, extras, bars, stage, phase,
                t == 0, D, PARTS, STAGES,
            )  # fmt: skip
            one, two = next_one, next_two
            # The next job, its row, its first block: each is asked for a tile after the one that says where it is.
            if CLAIM and t == gl.maximum(tiles - 4, 0):
                _wait_for_order()
                claim = claim_next(counter, jobs, careful == 0, job < programs)
            if t == gl.maximum(tiles - 3, 0):
                number = programs + (claimed_of(counter, claim, jobs) if CLAIM else number)
                at, until = number, in_order
                if careful != 0:
                    at, until = gl.where(head < 0, jobs, head), jobs
                next_job, next_begin, next_full, next_n = _read_row(
                    row_start, full, partial, order, at, jobs, until, qb, heads, list_b, list_h, HAS_PARTIAL
                )
                if at >= jobs:
                    next_job = -1 - (careful == 0).to(gl.int32)  # type: ignore[attr-defined]
            if t == gl.maximum(tiles - 2, 0):
                next_first = _first(indices, next_begin, next_full, next_n, kb, EVEN_K, HAS_PARTIAL)
                far = indices + next_begin.to(gl.int64)  # type: ignore[attr-defined]
                far_one, far_two = _blocks(far, next_n, next_first, 0, kb, PARTS)
                if next_job != -2:
                    for w in gl.static_range(2):
                        mbarrier.wait(q_empty.index(w), q_phase)
                    q_phase ^= 1
                    if careful == 0:
                        head = _collect(failed.index(q_phase), again, head, before)
                    elif head >= 0:
                        head = gl.load(again + head)
                    _announce(
                        desc_q, q_bufs, info.index(q_phase), q_full, next_job, next_n, careful, qb, heads, PARTS, EVEN_K
                    )
        late, before = before, job
        job, begin, n_full, n, first = next_job, next_begin, next_full, next_n, next_first
        one, two = far_one, far_two
        if job == -2:
            # All tiles are on their way. When the last sums are known, so is what must be repeated.
            job, n, careful = -1, 0, 2
            # After its first tile ``checked`` has been counted for the job before.
            for w in gl.static_range(2):
                mbarrier.wait(q_empty.index(w), q_phase)
            mbarrier.wait(checked, q_phase)
            head = _collect(failed.index(q_phase ^ 1), again, head, late)
            head = _collect(failed.index(q_phase), again, head, before)
            if head >= 0:
                job, begin, n_full, n = _read_row(
                    row_start, full, partial, order, head, jobs, jobs, qb, heads, list_b, list_h, HAS_PARTIAL
                )
                head = gl.load(again + head)
                first = _first(indices, begin, n_full, n, kb, EVEN_K, HAS_PARTIAL)
                one, two = _blocks(indices + begin.to(gl.int64), n, first, 0, kb, PARTS)
            q_phase ^= 1
            _announce(desc_q, q_bufs, info.index(q_phase), q_full, job, n, careful, qb, heads, PARTS, EVEN_K)
