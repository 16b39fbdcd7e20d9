"""The producer warp of the Hopper kernel: hands out jobs, fetches their tiles, says which keys count; see :mod:`.hopper`.

A *tile* is 128 keys: one block of 128, or two entries of a list of blocks of 64. In a biased tile, ``extras`` says what is
added to the product of each key and any query before it is scaled: minus infinity for a key that does not count.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from .hopper_steps import eight, next_stage, on_the_spot, split_job
from .hopper_windows import biased_tiles, key_bits

__all__ = ["claim_next", "claimed_of", "describe", "enter", "producer"]


@gluon.jit
def _program(anything):
    """The program's number, read on the spot: LLVM shares ``program_id`` between the roles, which costs a spill."""
    return gl.inline_asm_elementwise(
        "mov.u32 $0, %ctaid.x; // $1", "=r,r", [anything], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _wait_for_order():
    """Wait for the kernel that sorts the jobs and sets the counter to 0, beside which this one was started."""
    gl.inline_asm_elementwise("griddepcontrol.wait; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _claim(counter):
    """Add 1 to the counter; only lane 0 gets the number, and nobody waits for it before :func:`_claimed`."""
    return gl.inline_asm_elementwise(
        """{
        .reg .pred first; .reg .u32 lane;
        mov.u32 lane, %laneid; setp.eq.u32 first, lane, 0; mov.u32 $0, 0;
        @first atom.global.add.u32 $0, [$1], 1;
        }""",
        "=r,l", [counter.to(gl.int64)], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _claimed(number):
    """What lane 0 has claimed."""
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, 0, 31, -1;", "=r,r", [number], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def enter(counter, alone):
    """What comes before anything is read; started ``alone``, without a kernel that sorts, it waits for what came before.

    The first program sets the counter to 0 and leaves a sign behind it, where nobody knows what memory held. The last claim
    of all takes the sign away.
    """
    gl.inline_asm_elementwise(
        """{
        .reg .pred waits, sets; .reg .u32 x;
        setp.ne.u32 waits, $2, 0;
        @waits griddepcontrol.wait;
        mov.u32 x, %ctaid.x; setp.eq.u32 sets, x, 0;
        mov.u32 x, %laneid; setp.eq.and.u32 sets, x, 0, sets;
        @sets st.global.u32 [$1], 0;
        @sets st.release.gpu.global.u64 [$1 + 8], 0x8f1d3c5ae9b47260;
        mov.u32 $0, 0;
        }""",
        "=r,l,r", [counter.to(gl.int64), alone], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def claim_next(counter, none, more, first):
    """Like :func:`_claim` if there may be ``more`` jobs, else ``none``.

    The ``first`` claim of a program waits until the counter is 0. Each claims once a job, so that there are as many claims
    as jobs.
    """
    return gl.inline_asm_elementwise(
        """{
        .reg .pred mine, waits; .reg .u32 lane; .reg .u64 sign;
        mov.u32 lane, %laneid; setp.eq.u32 mine, lane, 0; setp.ne.and.u32 mine, $3, 0, mine;
        setp.ne.u32 waits, $3, 0; setp.ne.and.u32 waits, $4, 0, waits;
        mov.u32 $0, $2;
        WAIT:
        @waits ld.acquire.gpu.global.u64 sign, [$1 + 8];
        @waits setp.ne.u64 waits, sign, 0x8f1d3c5ae9b47260;
        vote.sync.any.pred waits, waits, -1;
        @waits bra.uni WAIT;
        @mine atom.global.add.u32 $0, [$1], 1;
        }""",
        "=&r,l,r,r,r", [counter.to(gl.int64), none, more.to(gl.int32), first.to(gl.int32)],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def claimed_of(counter, claim, jobs):
    """Like :func:`_claimed`; whose claim is the last takes away the sign that :func:`enter` has put."""
    return gl.inline_asm_elementwise(
        """{
        .reg .pred last; .reg .u32 x;
        mov.u32 x, %laneid; setp.eq.u32 last, x, 0; sub.u32 x, $3, 1; setp.eq.and.u32 last, $2, x, last;
        @last st.global.u64 [$1 + 8], 0;
        shfl.sync.idx.b32 $0, $2, 0, 31, -1;
        }""",
        "=r,l,r,r", [counter.to(gl.int64), claim, jobs], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _read_row(
    row_start, full, partial, order, number, jobs, in_order, qb, heads, list_b, list_h, HAS_PARTIAL: gl.constexpr
):
    """Job number ``number`` and its list: where it starts, its whole blocks and all its blocks; empty behind the end."""
    there = number < jobs
    job = gl.load(order + (number - in_order), mask=there & (number >= in_order), other=0)
    job = gl.where(number < in_order, number, job)
    i_q, i_h, i_b = split_job(job, qb, heads)
    i_row = i_b * list_b + i_h * list_h + i_q
    begin = gl.load(row_start + i_row, mask=there, other=0)
    n_full = gl.load(full + i_row, mask=there, other=0)
    n = n_full
    if HAS_PARTIAL:
        n += gl.load(partial + i_row, mask=there, other=0)
    return job, begin, n_full, n


@gluon.jit
def _first(indices, begin, n_full, n, kb, EVEN_K: gl.constexpr, HAS_PARTIAL: gl.constexpr):
    """The position to visit first: that of the ragged block, if the list has it."""
    first = n - 1
    if HAS_PARTIAL and not EVEN_K:
        # Ids are sorted: the ragged block is the last of the whole ones or the last of the partial ones.
        middle = gl.load(indices + (begin.to(gl.int64) + n_full - 1), mask=n_full > 0, other=-1) + 1 == kb
        first = gl.where(middle, n_full - 1, first)
    return first


@gluon.jit
def _entry(ids, n, first, visit, kb):
    """The block of a list that is visited as number ``visit``, from the last to the first but for ``first``, else kb."""
    place = n - 1 - visit
    place = gl.where(visit == 0, first, gl.where(place == first, n - 1, place))
    return gl.load(ids + place, mask=visit < n, other=kb)


@gluon.jit
def _blocks(ids, n, first, t, kb, PARTS: gl.constexpr):
    """The one or two blocks of tile ``t``; the first tile of an odd list has one. ``kb`` stands for none."""
    if PARTS == 1:
        one = _entry(ids, n, first, t, kb)
        return one, one
    odd = n & 1
    one = _entry(ids, n, first, gl.maximum(2 * t - odd, 0), kb)
    two = _entry(ids, n, first, 2 * t + 1 - odd, kb)
    return one, gl.where((t == 0) & (odd == 1), kb, two)


@gluon.jit
def _copy(desc, i_b, i_h, one, two, bufs, bar, stage, D: gl.constexpr, PARTS: gl.constexpr):
    if PARTS == 1:
        tma.async_copy_global_to_shared(desc, [i_b, i_h, one * 128, 0], bar, bufs.index(stage))
    else:
        # The same bytes as pieces of 64 tokens by 64 columns.
        COLUMNS: gl.constexpr = D // 64
        pieces = bufs._reinterpret(desc.dtype, [bufs.shape[0] * 2 * COLUMNS, 1, 1, 64, 64], desc.layout)
        for c in gl.static_range(COLUMNS):
            at = (stage * COLUMNS + c) * 2
            tma.async_copy_global_to_shared(desc, [i_b, i_h, one * 64, c * 64], bar, pieces.index(at))
            tma.async_copy_global_to_shared(desc, [i_b, i_h, two * 64, c * 64], bar, pieces.index(at + 1))


@gluon.jit
def _load_tile(
    desc_k, desc_v, i_b, i_h, one, two, extra, k_bufs, v_bufs, extras, bars, stage, phase, biased,
    D: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr, WINDOWS: gl.constexpr = 0,
):  # fmt: skip
    """Fill one stage of the rings with the keys and values of one or two blocks."""
    k_full, v_full, empty = bars
    BYTES: gl.constexpr = 128 * D * 2
    after, after_phase = next_stage(stage, phase, STAGES)
    mbarrier.wait(empty.index(stage), phase ^ 1)
    if biased:
        if WINDOWS:
            extras[0].index(stage).store(extra[0])
            extras[1].index(stage).store(extra[1])
        else:
            extras.index(stage).store(extra)
        gl.thread_barrier()
    mbarrier.expect(k_full.index(stage), BYTES)
    _copy(desc_k, i_b, i_h, one, two, k_bufs, k_full.index(stage), stage, D, PARTS)
    # The values that were here are done with one tile after their keys.
    mbarrier.wait(empty.index(after), after_phase ^ 1)
    mbarrier.expect(v_full.index(stage), BYTES)
    _copy(desc_v, i_b, i_h, one, two, v_bufs, v_full.index(stage), stage, D, PARTS)
    return after, after_phase


@gluon.jit
def _pooled_bias(bias, bits, start, kb, inv_scale):
    """What is added to the pooled keys from ``start`` on, ``[128]``; each lane has four of them and reads one word."""
    KEYS: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [1, 1], [1, 0])
    o_4 = start + 4 * gl.arange(0, 32, layout=gl.SliceLayout(1, KEYS))
    word = gl.load(bits + o_4 // 32, mask=o_4 < kb, other=-1) >> (o_4 % 32)
    part = gl.expand_dims(gl.arange(0, 4, layout=gl.SliceLayout(0, KEYS)), 0)
    o_k = gl.expand_dims(o_4, 1) + part
    extra = gl.load(bias + o_k, mask=o_k < kb, other=float("-inf")) * inv_scale
    extra = gl.where(((gl.expand_dims(word, 1) >> part) & 1) == 0, extra, float("-inf"))
    return gl.convert_layout(extra.reshape([128]), gl.BlockedLayout([4], [32], [1], [0]))


@gluon.jit
def _collect(failed, again, head):
    """Put the job whose output the consumers have just written on the list of those to repeat if it must."""
    LINE: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    job = gl.max(failed.slice(0, 2).load(LINE), 0)
    if job >= 0:
        gl.store(again + job, head)
        head = job
        failed.slice(0, 2).store(gl.full([2], -1, gl.int32, LINE))
        gl.thread_barrier()
    return head


@gluon.jit
def _fetch_queries(
    gather, q_tile, bar, i_q, i_h, i_b, w: gl.constexpr, D: gl.constexpr, DIM: gl.constexpr
):  # fmt: skip
    """Ask for the queries of a consumer, 16 bytes a copy and lane; zeros where there is none.

    What is read of the table is in the L1 cache when the consumer looks for where its output goes.
    """
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [1, 1], [1, 0])
    q, table, head_row, tokens, sq, q_b, q_h, q_s = gather
    o_q = i_q * 128 + w * 64 + gl.arange(0, 64, layout=gl.BlockedLayout([2], [32], [1], [0]))
    table += gl.load(head_row + i_h) * sq
    token = gl.load(table + o_q, mask=o_q.to(gl.int64) < sq, other=-1)
    gl.thread_barrier()
    tokens.store(token)
    gl.thread_barrier()
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, ROWS))
    q += i_b.to(gl.int64) * eight(q_b) + i_h.to(gl.int64) * eight(q_h)
    for i in gl.static_range(8):
        row = tokens.slice(i * 8, 8).load(gl.SliceLayout(1, ROWS))
        there = gl.expand_dims(row >= 0, 1)
        if DIM < D:
            there = there & gl.expand_dims(o_d < DIM, 0)
        at = q + gl.expand_dims(gl.maximum(row, 0).to(gl.int64) * eight(q_s), 1) + gl.expand_dims(o_d, 0)
        async_copy.async_copy_global_to_shared(q_tile.slice(i * 8, 8), at, mask=there)
    # Counts up by the lanes, each of which counts down once its copies are there.
    async_copy.mbarrier_arrive(bar)
    gl.thread_barrier()
    mbarrier.arrive(bar, count=1)


@gluon.jit
def describe(job, n_biased, n_plain, careful, i_q, i_h, i_b, masked, WARPS: gl.constexpr = 1):
    """What consumers are told about a job, ``[8]``, in this order."""
    o = on_the_spot(gl.arange(0, 8, layout=gl.BlockedLayout([1], [32], [WARPS], [0])))
    x = gl.where(o == 0, job, gl.where(o == 1, n_biased, gl.where(o == 2, n_plain, careful)))
    x = gl.where(o == 4, i_q, gl.where(o == 5, i_h, x))
    return gl.where(o == 6, i_b, gl.where(o == 7, masked, x))


@gluon.jit
def _announce(
    desc_q, q_bufs, info, q_full, job, n, n_full, careful, qb, kb, heads, PARTS: gl.constexpr, EVEN_K: gl.constexpr,
    HAS_POOLED: gl.constexpr, HAS_VALID: gl.constexpr, WINDOWS: gl.constexpr,
    gather, D: gl.constexpr, DIM: gl.constexpr, GATHER: gl.constexpr, FETCHED: gl.constexpr,
):  # fmt: skip
    """Tell the consumers their next job, its biased and its plain tiles, and fetch its queries."""
    tiles = gl.maximum((n + (PARTS - 1)) // PARTS, 1)
    n_biased = tiles if HAS_VALID else 1
    if WINDOWS and not HAS_VALID:
        n_biased = biased_tiles(n, n_full, tiles, EVEN_K, PARTS)
    n_plain = tiles - n_biased
    if HAS_POOLED:
        n_biased += gl.where(job < 0, 0, (kb + 127) // 128)
    i_q, i_h, i_b = split_job(gl.maximum(job, 0), qb, heads)
    # Whether all keys of the first tile count: a whole block or two, the ragged one not among them.
    masked = 1
    if EVEN_K and not HAS_POOLED and not HAS_VALID:
        masked = ((n == 0) | (n % PARTS != 0)).to(gl.int32)
    info.store(describe(job, n_biased, n_plain, careful | (n == 0).to(gl.int32), i_q, i_h, i_b, masked))
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
def producer(
    args, D: gl.constexpr, DIM: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, EVEN_K: gl.constexpr,
    HAS_PARTIAL: gl.constexpr, HAS_POOLED: gl.constexpr, HAS_VALID: gl.constexpr, GATHER: gl.constexpr,
    FAST: gl.constexpr, WINDOWS: gl.constexpr, FETCHED: gl.constexpr, RELEASE: gl.constexpr,
):  # fmt: skip
    """Take jobs until there are none, and fetch their queries and tiles."""
    (
        desc_q, desc_k, desc_v, desc_pk, desc_pv, row_start, full, partial, indices, order, counter, again,
        bias, bits, valid, inv_scale, sk, words, qb, kb, heads, jobs, in_order, programs, alone,
        list_b, list_h, bits_b, bits_h, bias_b, bias_h, k_bits, k_base,
        q, table, head_row, tokens, table_s, q_b, q_h, q_s,
        q_bufs, k_bufs, v_bufs, extras, info, failed, q_full, q_empty, bars,
    ) = args  # fmt: skip
    PARTS: gl.constexpr = 128 // BLOCK_K
    EARLY: gl.constexpr = 1 if FETCHED else 0
    gather = (q, table, head_row, tokens, table_s, q_b, q_h, q_s)
    LINE: gl.constexpr = gl.BlockedLayout([4], [32], [1], [0])
    PAIR: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    # The phase of the queries, and 2 where jobs are repeated: one register.
    stage, phase, turn, head = 0, 0, 1, -2
    enter(counter, alone)
    job, begin, n_full, n = _read_row(
        row_start, full, partial, order, _program(jobs), jobs, in_order, qb, heads, list_b, list_h, HAS_PARTIAL
    )
    _announce(
        desc_q, q_bufs, info.index(0), q_full, job, n, n_full, 0, qb, kb, heads,
        PARTS, EVEN_K, HAS_POOLED, HAS_VALID, WINDOWS, gather, D, DIM, GATHER, FETCHED,
    )  # fmt: skip
    first = _first(indices, begin, n_full, n, kb, EVEN_K, HAS_PARTIAL)
    one, two = _blocks(indices + begin.to(gl.int64), n, first, 0, kb, PARTS)
    while job != -1:
        i_q, i_h, i_b = split_job(gl.maximum(job, 0), qb, heads)
        ids = indices + begin.to(gl.int64)
        if HAS_POOLED:
            p_bias = bias + (i_b * bias_b + i_h * bias_h)
            p_bits = bits + (i_b * bits_b + i_h * bits_h + i_q * words)
            for start in range(0, gl.where(job < 0, 0, kb), 128):
                extra = _pooled_bias(p_bias, p_bits, start, kb, inv_scale)
                stage, phase = _load_tile(
                    desc_pk, desc_pv, i_b, i_h, start // 128, 0, extra, k_bufs, v_bufs, extras, bars, stage, phase,
                    True, D, 1, STAGES,
                )  # fmt: skip
        number, claim, next_job, next_begin, next_full, next_n = jobs, 0, 0, 0, 0, 0
        next_one, next_two = kb, kb
        tiles = gl.maximum((n + (PARTS - 1)) // PARTS, 1)
        n_biased = tiles if HAS_VALID else 1
        if WINDOWS and not HAS_VALID:
            n_biased = biased_tiles(n, n_full, tiles, EVEN_K, PARTS)
        for t in range(tiles):
            if WINDOWS:
                extra = (gl.full([128], 0, gl.int32, layout=LINE), gl.full([2], 0, gl.int32, layout=PAIR))
            else:
                extra = gl.full([128], 0.0, gl.float32, layout=LINE)
            if t < n_biased:
                o_k = gl.arange(0, 128, layout=LINE)
                token = o_k % BLOCK_K + BLOCK_K * gl.where(o_k < BLOCK_K, one, two)
                here = token < sk
                if HAS_VALID:
                    here = here & (gl.load(valid + (i_b.to(gl.int64) * sk + token), mask=here, other=0) != 0)
                if WINDOWS:
                    extra = key_bits(
                        k_bits, k_base, token, here, one, two, o_k, n, n_full, first, t, kb, PARTS
                    )  # fmt: skip
                else:
                    extra = gl.where(here, 0.0, float("-inf"))
            last, size = tiles, n
            if FETCHED or WINDOWS:
                # What follows from them is computed here: more is known before the loop than 24 registers hold.
                last, size = on_the_spot(tiles), on_the_spot(n)
            if t + 1 < tiles:
                if FETCHED or WINDOWS:
                    ids = indices + on_the_spot(begin).to(gl.int64)
                next_one, next_two = _blocks(ids, size, first, t + 1, kb, PARTS)
            stage, phase = _load_tile(
                desc_k, desc_v, i_b, i_h, one, two, extra, k_bufs, v_bufs, extras, bars, stage, phase,
                t < n_biased, D, PARTS, STAGES, WINDOWS,
            )  # fmt: skip
            one, two = next_one, next_two
            # The next job is claimed late: one that is claimed during a long job waits for its end, though others are
            # idle. Each of these three reads takes about as long as a tile.
            if t == gl.maximum(last - 5 - EARLY, 0):
                _wait_for_order()
                claim = claim_next(counter, jobs, (turn < 2) & (job >= 0), head == -2)
                head = gl.maximum(head, -1)
            if t == gl.maximum(last - 3 - EARLY, 0):
                number = programs + claimed_of(counter, claim, jobs)
                next_job, next_begin, next_full, next_n = _read_row(
                    row_start, full, partial, order, number, jobs, in_order, qb, heads, list_b, list_h, HAS_PARTIAL
                )
            # Its queries follow once those of this job have left their buffer.
            if t == gl.maximum(last - 2 - EARLY, gl.minimum(last - 1, STAGES + RELEASE)):
                for w in gl.static_range(2):
                    mbarrier.wait(q_empty.index(w), (turn & 1) ^ 1)
                turn ^= 1
                if FAST:
                    head = _collect(failed, again, head)
                if job == -2:
                    # The job before has been finished: now it is known what must be repeated.
                    turn |= 2
                    next_job = -1
                elif (turn > 1) | (number >= jobs):
                    next_job, next_full, next_n = -2, 0, 0
                if FAST:  # noqa: SIM102
                    if (turn > 1) & (head >= 0):
                        next_job, next_begin, next_full, next_n = _read_row(
                            row_start, full, partial, order, head, jobs, jobs, qb, heads, list_b, list_h, HAS_PARTIAL
                        )
                        head = gl.load(again + head)
                _announce(
                    desc_q, q_bufs, info.index((turn & 1) ^ 1), q_full, next_job, next_n, next_full, turn >> 1, qb, kb,
                    heads, PARTS, EVEN_K, HAS_POOLED, HAS_VALID, WINDOWS, gather, D, DIM, GATHER, FETCHED,
                )  # fmt: skip
        job, begin, n_full, n = next_job, next_begin, next_full, next_n
        first = _first(indices, begin, n_full, n, kb, EVEN_K, HAS_PARTIAL)
        one, two = _blocks(indices + begin.to(gl.int64), n, first, 0, kb, PARTS)  # type: ignore[attr-defined]
