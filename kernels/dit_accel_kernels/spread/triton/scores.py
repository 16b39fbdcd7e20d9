"""The map of expected errors from block moments in Triton, by two passes over the blocks of keys."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..._common import blocks, next_power_of_2
from ..._launch import capability, launch
from ...aot_spec import AotSpec
from .moments import Moments

__all__ = ["AOT_SPECS", "scores_triton"]

_LOG2E = 1.4426950408889634


@triton.jit
def _tile(X, first, count, channel, SPAN: tl.constexpr, DIM: tl.constexpr):
    """``SPAN`` rows from ``first`` on, 0 beyond ``count``."""
    row = first + tl.arange(0, SPAN)
    p_x = X + row[:, None] * DIM + channel[None, :]
    return tl.load(p_x, mask=(row < count)[:, None] & (channel[None, :] < DIM), other=0.0)


@triton.jit
def _product(b_a, b_a_rest, b_b, b_b_rest):
    """``a @ b.T`` of numbers in two bfloat16 parts, small terms first."""
    b_found = tl.dot(b_a_rest, b_b.T)
    b_found = tl.dot(b_a, b_b_rest.T, b_found)
    return tl.dot(b_a, b_b.T, b_found)


@triton.jit
def _split(b_x):
    b_high = b_x.to(tl.bfloat16)
    return b_high, (b_x - b_high.to(tl.float32)).to(tl.bfloat16)


# Counts are not specialised: another number of tokens must not compile another kernel.
@triton.jit(do_not_specialize=["rows", "cols", "maps"])
def spread_scores_kernel(
    QUERY, KEY, VALUE, SQUARE, SIZE, OUT, rows, cols, maps, scale, scale2,
    DIM: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One program: BM blocks of queries of one head in one order."""
    i_map = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, WIDTH)
    first = tl.program_id(0) * BM
    q_step, k_step = tl.cast(maps, tl.int64) * rows * DIM, tl.cast(maps, tl.int64) * cols * DIM
    QUERY += i_map * rows * DIM
    KEY += i_map * cols * DIM
    VALUE += i_map * cols * DIM
    b_q = _tile(QUERY, first, rows, channel, BM, DIM)
    b_q_rest = _tile(QUERY + q_step, first, rows, channel, BM, DIM)
    top = tl.full([BM], float("-inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    b_out = tl.zeros([BM, WIDTH], tl.float32)
    for start in range(0, cols, BN):
        col = start + tl.arange(0, BN)
        b_k = _tile(KEY, start, cols, channel, BN, DIM)
        b_k_rest = _tile(KEY + k_step, start, cols, channel, BN, DIM)
        b_size = tl.load(SIZE + i_map * cols + col, mask=col < cols, other=float("-inf"))
        logits = _product(b_q, b_q_rest, b_k, b_k_rest) * scale2 + b_size[None, :]
        new_top = tl.maximum(top, tl.max(logits, 1))
        # With nothing to see so far both are -inf, and their difference would be NaN.
        safe = tl.where(new_top > float("-inf"), new_top, 0.0)
        shrink = tl.exp2(top - safe)
        weights = tl.exp2(logits - safe[:, None])
        b_sum = b_sum * shrink + tl.sum(weights, 1)
        b_p, b_p_rest = _split(weights)
        b_v = _tile(VALUE, start, cols, channel, BN, DIM)
        b_out = tl.dot(b_p_rest, b_v, b_out * shrink[:, None])
        b_out = tl.dot(b_p, _tile(VALUE + k_step, start, cols, channel, BN, DIM), b_out)
        b_out = tl.dot(b_p, b_v, b_out)
        top = new_top
    b_out /= b_sum[:, None]
    b_length = tl.sum(b_out * b_out, 1)
    b_o, b_o_rest = _split(b_out)
    b_norm = top + tl.log2(b_sum)
    b_vary = _tile(QUERY + 2 * q_step, first, rows, channel, BM, DIM)
    row = first + tl.arange(0, BM)
    for start in range(0, cols, BN):
        col = start + tl.arange(0, BN)
        b_k = _tile(KEY, start, cols, channel, BN, DIM)
        b_k_rest = _tile(KEY + k_step, start, cols, channel, BN, DIM)
        b_size = tl.load(SIZE + i_map * cols + col, mask=col < cols, other=float("-inf"))
        logits = _product(b_q, b_q_rest, b_k, b_k_rest) * scale2 + b_size[None, :]
        mass = tl.exp2(logits - b_norm[:, None])
        apart = tl.dot(b_vary, _tile(KEY + 2 * k_step, start, cols, channel, BN, DIM).T)
        b_v = _tile(VALUE, start, cols, channel, BN, DIM)
        b_v_rest = _tile(VALUE + k_step, start, cols, channel, BN, DIM)
        b_square = tl.load(SQUARE + i_map * cols + col, mask=col < cols, other=0.0)
        far = b_square[None, :] - 2 * _product(b_o, b_o_rest, b_v, b_v_rest) + b_length[:, None]
        # NaN must stay: it says that the inputs were not finite.
        far = tl.maximum(far, 0.0, propagate_nan=tl.PropagateNan.ALL)
        apart = tl.maximum(apart, 0.0, propagate_nan=tl.PropagateNan.ALL)
        found = mass * tl.sqrt(apart) * tl.sqrt(far) * scale
        p_out = OUT + (i_map * rows + row)[:, None] * cols + col[None, :]
        tl.store(p_out, found, mask=(row < rows)[:, None] & (col < cols)[None, :])


def _tile_of(rows: int, dim: int, capability: int) -> tuple[dict[str, int], dict[str, int]]:
    """Constants and options of a launch; a capability of 0 is a GPU of AMD."""
    if not capability:
        return {"BM": 16 if dim > 128 else 32, "BN": 32}, {"num_warps": 4, "num_stages": 1}
    if dim > 128:
        return {"BM": 16, "BN": 32}, {"num_warps": 8, "num_stages": 1}
    if capability != 90:
        return {"BM": 16 if dim > 64 or rows <= 16 else 32, "BN": 32}, {"num_warps": 4, "num_stages": 2}
    if rows <= 16:
        return {"BM": 16, "BN": 32}, {"num_warps": 4, "num_stages": 3}
    if rows < 256:
        return {"BM": 64, "BN": 32}, {"num_warps": 4, "num_stages": 2}
    return {"BM": 128, "BN": 32}, {"num_warps": 8, "num_stages": 2}


def scores_triton(moments: Moments, scale: float) -> Tensor:
    """Expected error of each pair of blocks, float32 ``[C, B, H, R, Kb]``; see :mod:`dit_accel_kernels.spread`."""
    shape, cols, dim = moments.query.shape[1:5], moments.size.shape[-1], moments.query.shape[-1]
    maps, rows = shape[0] * shape[1] * shape[2], shape[3]
    out = moments.size.new_empty((*shape, cols))
    tile, options = _tile_of(rows, dim, capability(out))
    launch(spread_scores_kernel, (blocks(rows, tile["BM"]), maps))(
        moments.query, moments.key, moments.value, moments.square, moments.size, out, rows, cols, maps,
        scale, scale * _LOG2E, DIM=dim, WIDTH=next_power_of_2(dim), **tile, **options,
    )  # fmt: skip
    return out


def _spec(dim: int, rows: int, targets: tuple[str, ...], least: int) -> AotSpec:
    tile, options = _tile_of(rows, dim, least)
    constants = {"DIM": dim, "WIDTH": next_power_of_2(dim), **tile}
    types = dict.fromkeys(("QUERY", "KEY", "VALUE"), "*bf16") | dict.fromkeys(("SQUARE", "SIZE", "OUT"), "*fp32")
    types |= {"scale": "fp32", "scale2": "fp32"}
    names = spread_scores_kernel.arg_names
    return AotSpec(
        name=f"spread_scores/d{dim}/{rows}/{tile['BM']}x{tile['BN']}/{least or 'amd'}",
        fn=spread_scores_kernel,
        signature={name: "constexpr" if name in constants else types.get(name, "i32") for name in names},
        constexprs=constants,
        options=options,
        targets=targets,
        divisible_by_16=("QUERY", "KEY", "VALUE"),
    )


AOT_SPECS = [
    _spec(dim, rows, targets, least)
    for dim, rows in ((128, 16), (128, 591), (128, 64), (64, 139), (256, 64))
    for targets, least in ((("sm_80", "sm_89", "sm_100"), 80), (("sm_90",), 90), (("gfx942",), 0))
]
