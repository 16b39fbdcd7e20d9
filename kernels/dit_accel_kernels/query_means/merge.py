"""Puts the segments of :mod:`.hopper` together, adds the pooled keys and takes the difference."""

# Kernels have no types.
# mypy: disallow_untyped_defs=False, disallow_incomplete_defs=False
# mypy: disallow_untyped_decorators=False, disallow_untyped_calls=False

from __future__ import annotations

import triton
import triton.language as tl

from ..aot_spec import AotSpec
from .triton import pooled_keys

__all__ = ["AOT_SPECS", "merge_kernel"]


@triton.jit
def _segment(SUMS, ACCS, slot, o_row, channel, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Sums and accumulators of one segment: maximum, sum of all weights, of those kept, and what belongs to them."""
    p_sum = SUMS + slot * (3 * ROWS) + o_row
    p_acc = ACCS + slot * (2 * ROWS * WIDTH) + o_row[:, None] * WIDTH + channel[None, :]
    top, all_sum, kept_sum = tl.load(p_sum), tl.load(p_sum + ROWS), tl.load(p_sum + 2 * ROWS)
    return top, all_sum, kept_sum, tl.load(p_acc), tl.load(p_acc + ROWS * WIDTH)


@triton.jit(
    do_not_specialize=["rows", "kb", "heads", "row_tiles", "share", "tiles", "bits_b", "bits_h", "bias_b", "bias_h"]
)
def merge_kernel(
    MEANS, POOL_K, POOL_V, BIAS, BITS, SUMS, ACCS, OUT, scale2, rows, kb, heads, row_tiles, share, tiles,
    bits_b, bits_h, bias_b, bias_h,
    DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M mean queries of one head, which lie in one tile of ROWS."""
    i_m, plane = tl.program_id(0), tl.program_id(1)
    i_b, i_h = (plane // heads).to(tl.int64), (plane % heads).to(tl.int64)
    o_m, channel = i_m * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, WIDTH)
    i_row, o_row = i_m * BLOCK_M // ROWS, i_m * BLOCK_M % ROWS + tl.arange(0, BLOCK_M)
    first, last = plane * tiles // share, (plane * tiles + tiles - 1) // share
    top = tl.full([BLOCK_M], -1.0e30, tl.float32)
    for group in range(first, last + 1):
        slot = ((group + plane) * row_tiles + i_row).to(tl.int64)
        p_sum = SUMS + slot * (3 * ROWS) + o_row
        # A sum of so much says that there are logits far above ``own``. Those of many near it do not count: what is kept
        # may lie far below the largest, so that ``top`` must not lie above it.
        above = tl.maximum(tl.log2(tl.load(p_sum + ROWS)) - 16.0, 0.0)
        top = tl.maximum(top, tl.load(p_sum) + above)
    m_m = o_m < rows
    plane64 = plane.to(tl.int64)
    p_mean = (plane64 * rows + o_m)[:, None] * DIM + channel[None, :]
    m_mean = m_m[:, None] & (channel[None, :] < DIM)
    b_q = tl.load(MEANS + p_mean, mask=m_mean, other=0.0)
    p_bits = BITS + i_b * bits_b + i_h * bits_h + o_m.to(tl.int64) * tl.cdiv(kb, 32)
    # A pooled logit does not exceed the largest of its block by more than the log of its count: nothing overflows.
    kept_sum, kept_acc = pooled_keys(
        b_q, POOL_K + plane64 * kb * DIM, POOL_V + plane64 * kb * DIM, BIAS + i_b * bias_b + i_h * bias_h, p_bits, m_m,
        kb, top, tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, WIDTH], tl.float32), scale2, channel,
        DIM, BLOCK_N, False, "tf32",
    )  # fmt: skip
    all_sum, all_acc = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, WIDTH], tl.float32)
    for group in range(first, last + 1):
        slot = ((group + plane) * row_tiles + i_row).to(tl.int64)
        own, part_all, part_kept, more_all, more_kept = _segment(SUMS, ACCS, slot, o_row, channel, ROWS, WIDTH)
        # Sums may be up to 2^100, where ``own`` is the maximum of the first tile alone: by the logarithm of its sum a
        # segment cannot be lost to underflow that matters. Two factors, since their product may not be representable.
        size = tl.log2(part_all)
        even, shrink = tl.exp2(-size), tl.exp2(own + size - top)
        all_sum += (part_all * even) * shrink
        kept_sum += (part_kept * even) * shrink
        all_acc += (more_all * even[:, None]) * shrink[:, None]
        kept_acc += (more_kept * even[:, None]) * shrink[:, None]
    lacks = all_acc / all_sum[:, None] - kept_acc / kept_sum[:, None]
    lacks = tl.where(tl.abs(lacks) < float("inf"), lacks, 0.0)  # NaN compares false as well
    tl.store(OUT + p_mean, lacks.to(OUT.dtype.element_ty), mask=m_mean)


def _spec(dim: int, dtype: str, rows: int) -> AotSpec:
    constants = {"DIM": dim, "WIDTH": 64 if dim <= 64 else 128, "ROWS": rows, "BLOCK_M": 32, "BLOCK_N": 64}
    types = dict.fromkeys(("MEANS", "POOL_K", "POOL_V", "OUT"), f"*{dtype}")
    types |= {"BIAS": "*fp32", "BITS": "*i32", "SUMS": "*fp32", "ACCS": "*fp32", "scale2": "fp32"}
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in merge_kernel.arg_names}
    return AotSpec(
        name=f"query_means/merge/d{dim}/{dtype}",
        fn=merge_kernel,
        signature=signature,
        constexprs=constants,
        options={"num_warps": 4, "num_stages": 3},
        targets=("sm_90",),
        divisible_by_16=("MEANS", "POOL_K", "POOL_V", "OUT", "SUMS", "ACCS"),
    )


AOT_SPECS = [_spec(128, "bf16", 128), _spec(64, "bf16", 192), _spec(72, "fp16", 128)]
