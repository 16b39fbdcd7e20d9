"""In which order query blocks are done: longest list first among some heads, found on the GPU without a host read.

Equal rows keep their order. Rows of unequal length end together only if the last to start are short; and keys come from
the L2 cache only while few heads are at work. So jobs are sorted within groups of neighbouring heads, counted from the
end: all heads of a group are begun before the next group is, and the last group is a whole one.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..aot_spec import AotSpec

__all__ = ["AOT_SPECS", "BLOCK", "OTHERS", "longest_first_kernel"]

# Jobs of a program, and those it compares them with at once: many small programs, so that it takes a few microseconds.
BLOCK = 16
OTHERS = 1024


@triton.jit
def _length(full, partial, job, last, qb, heads, list_b, list_h, HAS_PARTIAL: tl.constexpr):
    """Length of the lists of some jobs, -1 behind the last."""
    rest = job // qb
    i_row = rest // heads * list_b + rest % heads * list_h + (job - rest * qb)
    n = tl.load(full + i_row, mask=job < last, other=-1)
    if HAS_PARTIAL:
        n += tl.load(partial + i_row, mask=job < last, other=0)
    return n


@triton.jit(do_not_specialize=["first", "jobs", "qb", "heads", "list_b", "list_h", "span"])
def longest_first_kernel(
    full, partial, order, counter, first, jobs, qb, heads, list_b, list_h,
    HAS_PARTIAL: tl.constexpr, BLOCK: tl.constexpr, OTHERS: tl.constexpr, PDL: tl.constexpr = False, span=2147483647,
):  # fmt: skip
    """Write the jobs from ``first`` on, by descending length of their lists within groups of ``span``; zero the counter.

    With ``PDL`` it waits for what came before it and lets the kernel that uses the order start beside it: that one does its
    first jobs without an order, and asks for no other before this kernel has ended.

    Groups are counted from the last job backwards; ties keep their order. The place of a job is the number of those
    before it, counted: a group has some hundred.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    i_chunk = tl.program_id(0)
    low = first + i_chunk * BLOCK
    job = low + tl.arange(0, BLOCK)
    n = _length(full, partial, job, jobs, qb, heads, list_b, list_h, HAS_PARTIAL)
    # Groups of the first and the last job of this program, and where the group of each job begins.
    oldest, newest = (jobs - 1 - low) // span, (jobs - tl.minimum(low + BLOCK, jobs)) // span
    group = (jobs - 1 - job) // span
    place = tl.maximum(jobs - (group + 1) * span.to(tl.int64), first).to(tl.int32) - first
    begin = tl.maximum(jobs - (oldest + 1) * span.to(tl.int64), first).to(tl.int32)
    for start in range(begin, jobs - newest * span, OTHERS):
        other = start + tl.arange(0, OTHERS)
        m = _length(full, partial, other, jobs, qb, heads, list_b, list_h, HAS_PARTIAL)
        before = (m[None, :] > n[:, None]) | ((m[None, :] == n[:, None]) & (other[None, :] < job[:, None]))
        near = (jobs - 1 - other)[None, :] // span == group[:, None]
        place += tl.sum((before & near).to(tl.int32), 1)
    tl.store(order + place, job, mask=job < jobs)
    tl.store(counter, 0, mask=i_chunk == 0)


AOT_SPECS = [
    AotSpec(
        name=f"block_sparse_hopper/schedule{'/partial' * has_partial}",
        fn=longest_first_kernel,
        signature={
            "full": "*i32",
            "partial": "*i32" if has_partial else "constexpr",
            **dict.fromkeys(("order", "counter"), "*i32"),
            **dict.fromkeys(("first", "jobs", "qb", "heads", "list_b", "list_h", "span"), "i32"),
            **dict.fromkeys(("HAS_PARTIAL", "BLOCK", "OTHERS"), "constexpr"),
        },
        constexprs={"HAS_PARTIAL": has_partial, "BLOCK": BLOCK, "OTHERS": OTHERS}
        | ({} if has_partial else {"partial": None}),
        options={"num_warps": 4},
        targets=("sm_90",),
    )
    for has_partial in (False, True)
]
