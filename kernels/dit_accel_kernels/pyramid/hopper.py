"""Gluon kernel for Hopper (sm_90): exact blocks, pooled remainder and gathered keys in one softmax.

The consumers are those of :mod:`dit_accel_kernels.block_sparse.hopper`; to them a gathered tile is one with a bias. What
differs is the producer (:mod:`.hopper_load`), which has four warps here: they ask for the rows of a tile in a fraction of a
step, with registers that would lie idle beside a single warp. A job's tiles are, in this order, those of its gathered keys,
all pooled keys, and the blocks of its list. Where no gathered key has a bias, only the last of its tiles, which may lack
keys, comes first, and the others follow the first block, since consumers take all biased tiles before the plain ones.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.language import int64

from ..block_sparse.hopper import _consumer
from .hopper_load import producer
from .hopper_specs import aot_specs

__all__ = ["AOT_SPECS", "gathered_hopper_kernel"]


@gluon.jit(do_not_specialize_on_alignment=[
    "lse", "table", "valid", "order", "counter", "again", "more_bias", "more_biased", "more_start",
    "more_count", "more_indices",
], do_not_specialize=[
    "sk", "words", "qb", "kb", "heads", "jobs", "in_order", "programs", "table_s", "se",
    "list_b", "list_h", "bits_b", "bits_h", "bias_b", "bias_h",
    "q_b", "q_h", "q_s", "out_b", "out_h", "out_s",
    "more_s", "more_k_b", "more_k_h", "more_v_b", "more_v_h",
    "more_list_b", "more_list_h", "more_bias_b", "more_bias_h",
])  # fmt: skip
def gathered_hopper_kernel(
    desc_q, desc_k, desc_v, desc_o, desc_pk, desc_pv, q, out, lse, row_start, full, partial, indices, order, counter,
    again, table, head_row, bias, bits, valid, more_k, more_v, more_bias, more_biased, more_start, more_count, more_indices,
    scale2, inv_scale, sk, words, qb, kb, heads, jobs, in_order, programs, se, more_s,
    table_s: int64, q_b: int64, q_h: int64, q_s: int64, out_b: int64, out_h: int64, out_s: int64,
    more_k_b: int64, more_k_h: int64, more_v_b: int64, more_v_h: int64,
    list_b, list_h, bits_b, bits_h, bias_b, bias_h, more_list_b, more_list_h, more_bias_b, more_bias_h,
    D: gl.constexpr, DIM: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, EVEN_K: gl.constexpr,
    HAS_PARTIAL: gl.constexpr, HAS_POOLED: gl.constexpr, HAS_VALID: gl.constexpr, GATHER: gl.constexpr,
    HAS_LSE: gl.constexpr, FAST: gl.constexpr, GROUP: gl.constexpr,
    LATE_BIAS: gl.constexpr, CONSUMER_REGS: gl.constexpr, PRODUCER_REGS: gl.constexpr,
):  # fmt: skip
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    BIAS: gl.constexpr = -1 if LATE_BIAS else 0
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_bufs = gl.allocate_shared_memory(desc_k.dtype, [2, 1, 1, 64, D], desc_k.layout)
    k_bufs = gl.allocate_shared_memory(desc_k.dtype, [STAGES, 1, 1, 128, D], desc_k.layout)
    v_bufs = gl.allocate_shared_memory(desc_k.dtype, [STAGES, 1, 1, 128, D], desc_k.layout)
    extras = gl.allocate_shared_memory(gl.float32, [STAGES, 128], FLAT)
    rows = gl.allocate_shared_memory(gl.int32, [128], FLAT)
    info = gl.allocate_shared_memory(gl.int32, [2, 8], FLAT)
    failed = gl.allocate_shared_memory(gl.int32, [4], FLAT)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    info.index(1).store(gl.full([8], -2, gl.int32, gl.BlockedLayout([1], [32], [4], [0])))
    failed.slice(0, 2).store(gl.full([2], -1, gl.int32, gl.BlockedLayout([1], [32], [4], [0])))
    fence_async_shared()
    bars = (k_full, v_full, empty)
    shared = (q_bufs, k_bufs, v_bufs, extras, info, failed, q_full, q_empty, bars)
    consumer_args = (  # noqa: RUF005
        desc_o, q, out, lse, table, head_row, scale2, heads, table_s, q_b, q_h, q_s, out_b, out_h, out_s,
    ) + shared  # fmt: skip
    producer_args = (  # noqa: RUF005
        desc_q, desc_k, desc_v, desc_pk, desc_pv, row_start, full, partial, indices, order, counter, again,
        bias, bits, valid, inv_scale, sk, words, qb, kb, heads, jobs, in_order, programs,
        list_b, list_h, bits_b, bits_h, bias_b, bias_h,
        more_k, more_v, more_bias, more_biased, more_start, more_count, more_indices, se,
        more_s, more_k_b, more_k_h, more_v_b, more_v_h,
        more_list_b, more_list_h, more_bias_b, more_bias_h, rows,
    ) + shared  # fmt: skip
    gl.warp_specialize(
        [
            (_consumer, (consumer_args, 0, D, DIM, STAGES, True, GATHER, HAS_LSE, FAST, BIAS)),
            (_consumer, (consumer_args, 1, D, DIM, STAGES, True, GATHER, HAS_LSE, FAST, BIAS)),
            (producer, (
                producer_args, D, DIM, BLOCK_K, STAGES, EVEN_K, HAS_PARTIAL, HAS_POOLED, HAS_VALID, GATHER, FAST,
                GROUP,
            )),
        ],
        [4, 4],
        [CONSUMER_REGS, PRODUCER_REGS],
    )  # fmt: skip


AOT_SPECS = aot_specs(gathered_hopper_kernel)
