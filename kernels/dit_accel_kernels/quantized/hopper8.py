"""Gluon kernel for Hopper (sm_90) with 8-bit products: a producer warp, two consumers of 64 query rows each.

Jobs, tiles and roles are those of :mod:`dit_accel_kernels.block_sparse.hopper`, which says what they mean. What differs:

- Queries and keys are INT8 or e4m3, so a tile of keys is half as large. Each consumer copies its queries into memory of its
  own, with e4m3 values into registers, and gives the buffer back at once. Values are 16-bit as they were, or e4m3
  transposed (8-bit operands must have their keys side by side) with the keys within each group of 16 in the order in which
  a thread of the accumulator holds its weights.
- A tile is two halves of 64 keys with a scale each. A logit is one multiply-add away from the product:
  ``product * (scale of the row * scale of the half) - base of the row``.
- ``base`` is the maximum of the first tile, with e4m3 weights less ``HEADROOM`` (in units of log 2). Weights can leave the
  range of their type, which is small for e4m3: 2^-9 to 448. A sum out of bounds, which with e4m3 is one that a saturated
  code may be part of, is noted in a register of the warp, and the warp takes a new base for this tile and shrinks what it
  has. Nothing is repeated, and most tiles take no maximum.
- With e4m3 values the consumers take turns: one starts its products when those of the other are done, see
  :mod:`.hopper8_turns`.
- ``ready[s]``: the keys of stage ``s`` and the values of the tile before have come; ``empty[s]``: both consumers have done
  with them.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.language import int64

from .hopper8_fp8_steps import consumer8
from .hopper8_load import producer
from .hopper8_specs import aot_specs
from .hopper8_steps import consumer

__all__ = ["AOT_SPECS", "quantized_hopper_kernel"]


@gluon.jit(do_not_specialize=[
    "zero", "sq", "sk", "qb", "kb", "heads", "jobs", "in_order", "programs", "list_b", "list_h", "out_b", "out_h", "out_s",
])  # fmt: skip
def quantized_hopper_kernel(
    desc_q, desc_k, desc_v, desc_o, out, lse, q_scale, k_scale, v_scale, row_start, full, partial, indices, order,
    counter, table, head_row, scale2, limit, zero, sq, sk, qb, kb, heads, jobs, in_order, programs, list_b, list_h,
    out_b: int64, out_h: int64, out_s: int64,
    D: gl.constexpr, DIM: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, EVEN_K: gl.constexpr,
    HAS_PARTIAL: gl.constexpr, GATHER: gl.constexpr, HAS_LSE: gl.constexpr, HEADROOM: gl.constexpr,
    TURNS: gl.constexpr, LINES: gl.constexpr, CONSUMER_REGS: gl.constexpr, PRODUCER_REGS: gl.constexpr,
):  # fmt: skip
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    OUT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    q_bufs = gl.allocate_shared_memory(desc_q.dtype, [2, 1, 1, 64, D], desc_q.layout)
    q_own = gl.allocate_shared_memory(desc_q.dtype, [2, 1, 1, 64, D], desc_q.layout)
    k_bufs = gl.allocate_shared_memory(desc_k.dtype, [STAGES, 1, 1, 128, D], desc_k.layout)
    if desc_v.dtype.primitive_bitwidth == 8:
        v_bufs = gl.allocate_shared_memory(desc_v.dtype, [STAGES * 2, 1, 1, D, 64], desc_v.layout)
    else:
        v_bufs = gl.allocate_shared_memory(desc_v.dtype, [STAGES, 1, 1, 128, D], desc_v.layout)
    o_bufs = gl.allocate_shared_memory(out.dtype.element_ty, [2, 1, 1, 64, D], OUT)
    q_scales = gl.allocate_shared_memory(gl.float32, [128], FLAT)
    scales = gl.allocate_shared_memory(gl.float32, [STAGES, 2], FLAT)
    extras = gl.allocate_shared_memory(gl.float32, [STAGES, 128], FLAT)
    info = gl.allocate_shared_memory(gl.int32, [2, 8], FLAT)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    fence_async_shared()
    bars = (ready, empty)
    consumer_args = (
        desc_o, out, lse, v_scale, table, head_row, scale2, limit, zero, heads, sq, out_b, out_h, out_s,
        q_bufs, q_own, q_scales, o_bufs, k_bufs, v_bufs, scales, extras, info, q_full, q_empty, bars,
    )  # fmt: skip
    producer_args = (
        desc_q, desc_k, desc_v, q_scale, k_scale, row_start, full, partial, indices, order, counter,
        sq, sk, qb, kb, heads, jobs, in_order, programs, list_b, list_h,
        q_bufs, q_scales, k_bufs, v_bufs, scales, extras, info, q_full, q_empty, bars,
    )  # fmt: skip
    if desc_v.dtype.primitive_bitwidth == 8:
        gl.warp_specialize(
            [
                (consumer8, (consumer_args, 0, D, DIM, STAGES, GATHER, HAS_LSE, HEADROOM, TURNS, LINES)),
                (consumer8, (consumer_args, 1, D, DIM, STAGES, GATHER, HAS_LSE, HEADROOM, TURNS, LINES)),
                (producer, (producer_args, D, BLOCK_K, STAGES, EVEN_K, HAS_PARTIAL)),
            ],
            [4, 1],
            [CONSUMER_REGS, PRODUCER_REGS],
        )
    else:
        gl.warp_specialize(
            [
                (consumer, (consumer_args, 0, D, DIM, STAGES, GATHER, HAS_LSE)),
                (consumer, (consumer_args, 1, D, DIM, STAGES, GATHER, HAS_LSE)),
                (producer, (producer_args, D, BLOCK_K, STAGES, EVEN_K, HAS_PARTIAL)),
            ],
            [4, 1],
            [CONSUMER_REGS, PRODUCER_REGS],
        )


AOT_SPECS = aot_specs(quantized_hopper_kernel)
