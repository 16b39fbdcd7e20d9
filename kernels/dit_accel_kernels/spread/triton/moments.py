"""Means and variances of blocks in Triton, of queries, keys and values under several orders, in one launch.

Means leave as two bfloat16 tensors, what rounds and the rest, so that products of them take three products on the matrix
units of any GPU and are as good as 16 bits; variances, of which only sums of products are taken, as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._common import blocks, next_power_of_2
from ..._launch import launch
from ...aot_spec import AotSpec

__all__ = ["AOT_SPECS", "Moments", "moments_triton"]

_BYTES, _WARPS = 8192, 1  # of a tile: many small programs with many loads each are fastest


class Moments(NamedTuple):
    """What :func:`moments_triton` returns; ``C`` orders, all bfloat16 unless it says otherwise.

    Attributes:
        query: ``[3, C, B, H, R, D]``: means, what is left of them, and variances.
        key: ``[3, C, B, H, Kb, D]``.
        value: ``[2, C, B, H, Kb, D]``: means, and what is left of them.
        square: float32 ``[C, B, H, Kb]``, mean of the squared length of a block's values.
        size: float32 ``[C, B, H, Kb]``, log2 of the number of valid keys.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    square: Tensor
    size: Tensor


@triton.jit
def _sums(
    base, p_table, p_valid, first, part, tokens, stride_s, channel, b_first,
    BLOCK: tl.constexpr, DIM: tl.constexpr, STEP: tl.constexpr, HAS_ORDER: tl.constexpr, HAS_VALID: tl.constexpr,
):  # fmt: skip
    """Of some tokens of a block: sums of what they differ by from its first one, and of the squares, and how many count."""
    within = part + tl.arange(0, STEP)
    token = first + within
    counts = (within < BLOCK) & (token < tokens)
    if HAS_ORDER:
        token = tl.load(p_table + token, mask=counts, other=0)
    if HAS_VALID:
        counts = counts & (tl.load(p_valid + token, mask=counts, other=0) != 0)
    # [STEP, WIDTH]
    p_x = base + token.to(tl.int64)[:, None] * stride_s + channel[None, :]
    b_x = tl.load(p_x, mask=counts[:, None] & (channel[None, :] < DIM), other=0.0).to(tl.float32)
    b_x = tl.where(counts[:, None], b_x - b_first[None, :], 0.0)
    return tl.sum(b_x, 0), tl.sum(b_x * b_x, 0), tl.sum(counts.to(tl.float32), 0)


@triton.jit
def _moments(
    base, p_table, p_valid, row, tokens, stride_s, channel,
    BLOCK: tl.constexpr, DIM: tl.constexpr, STEP: tl.constexpr, HAS_ORDER: tl.constexpr, HAS_VALID: tl.constexpr,
):  # fmt: skip
    """Mean and variance ``[WIDTH]`` of a block, and its number of valid tokens, without a tile that has to be held."""
    first = row * BLOCK
    token = first
    there = True
    if HAS_ORDER:
        token = tl.load(p_table + token)
    if HAS_VALID:
        there = tl.load(p_valid + token) != 0
    b_first = tl.load(base + tl.cast(token, tl.int64) * stride_s + channel, mask=(channel < DIM) & there, other=0.0)
    b_first = b_first.to(tl.float32)
    b_sum, b_square = tl.zeros_like(b_first), tl.zeros_like(b_first)
    size = 0.0
    if BLOCK <= 4 * STEP:  # all loads of a block are then under way at once
        for part in tl.static_range(0, BLOCK, STEP):
            b_more, b_more_square, more = _sums(
                base, p_table, p_valid, first, part, tokens, stride_s, channel, b_first,
                BLOCK, DIM, STEP, HAS_ORDER, HAS_VALID,
            )  # fmt: skip
            b_sum += b_more
            b_square += b_more_square
            size += more
    else:
        for part in range(0, BLOCK, STEP):
            b_more, b_more_square, more = _sums(
                base, p_table, p_valid, first, part, tokens, stride_s, channel, b_first,
                BLOCK, DIM, STEP, HAS_ORDER, HAS_VALID,
            )  # fmt: skip
            b_sum += b_more
            b_square += b_more_square
            size += more
    b_apart = b_sum / tl.maximum(size, 1.0)
    b_variance = b_square / tl.maximum(size, 1.0) - b_apart * b_apart
    # NaN must stay: it says that the inputs were not finite.
    return b_first + b_apart, tl.maximum(b_variance, 0.0, propagate_nan=tl.PropagateNan.ALL), size


@triton.jit
def _store_split(OUT, b_mean, channel, step, DIM: tl.constexpr):
    """A mean as what bfloat16 holds of it and, ``step`` further on, what that leaves."""
    b_high = b_mean.to(tl.bfloat16)
    tl.store(OUT + channel, b_high, mask=channel < DIM)
    tl.store(OUT + step + channel, (b_mean - b_high.to(tl.float32)).to(tl.bfloat16), mask=channel < DIM)


@triton.jit
def _table(TABLE, HEAD, i_c, i_h, heads, tokens, BY_HEAD: tl.constexpr):
    """The row of the table that a head uses; without BY_HEAD each order of the table is one candidate."""
    row = i_c.to(tl.int64)
    if BY_HEAD:
        row = tl.load(HEAD + i_c * heads + i_h).to(tl.int64)
    return TABLE + row * tokens


# Counts are not specialised: another number of tokens must not compile another kernel.
@triton.jit(do_not_specialize=["q_tokens", "k_tokens", "q_count", "k_count", "orders"])
def moments_kernel(
    Q, K, V, Q_TABLE, Q_HEAD, K_TABLE, K_HEAD, AT, VALID, QUERY, KEY, VALUE, SQUARE, SIZE,
    q_tokens, k_tokens, q_count, k_count, orders,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    STEP_Q: tl.constexpr, STEP_K: tl.constexpr, Q_ORDER: tl.constexpr, K_ORDER: tl.constexpr, BY_HEAD: tl.constexpr,
    SOME: tl.constexpr, HAS_VALID: tl.constexpr,
):  # fmt: skip
    """One program: one block of one head in one order. Heads come one after the other: L2 holds a head for all orders."""
    heads, batch = tl.num_programs(1), tl.num_programs(2)
    i_h, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, WIDTH)
    of_keys = orders * k_count
    entry = tl.program_id(0)
    if entry < 2 * of_keys:
        is_value = entry >= of_keys
        entry = tl.where(is_value, entry - of_keys, entry)
        i_c, i_row = entry // k_count, entry % k_count
        p_table = _table(K_TABLE, K_HEAD, i_c, i_h, heads, k_tokens, BY_HEAD)
        p_valid = VALID + i_b * k_tokens
        at = ((i_c * batch + i_b) * heads + i_h) * k_count + i_row
        step = tl.cast(orders, tl.int64) * batch * heads * k_count * DIM
        if is_value:
            b_mean, b_variance, size = _moments(
                V + i_b * v_stride_b + i_h * v_stride_h, p_table, p_valid, i_row, k_tokens, v_stride_s, channel,
                BLOCK_K, DIM, STEP_K, K_ORDER, HAS_VALID,
            )  # fmt: skip
            _store_split(VALUE + at * DIM, b_mean, channel, step, DIM)
            tl.store(SQUARE + at, tl.sum(b_mean * b_mean + b_variance, 0))
        else:
            b_mean, b_variance, size = _moments(
                K + i_b * k_stride_b + i_h * k_stride_h, p_table, p_valid, i_row, k_tokens, k_stride_s, channel,
                BLOCK_K, DIM, STEP_K, K_ORDER, HAS_VALID,
            )  # fmt: skip
            _store_split(KEY + at * DIM, b_mean, channel, step, DIM)
            tl.store(KEY + 2 * step + at * DIM + channel, b_variance.to(tl.bfloat16), mask=channel < DIM)
            tl.store(SIZE + at, tl.log2(size))
    else:
        entry -= 2 * of_keys
        i_c, i_row = entry // q_count, entry % q_count
        at = ((i_c * batch + i_b) * heads + i_h) * q_count + i_row
        step = tl.cast(orders, tl.int64) * batch * heads * q_count * DIM
        if SOME:
            i_row = tl.load(AT + i_row).to(tl.int32)
        # Another name: without an order the table is of another type.
        p_q_table = _table(Q_TABLE, Q_HEAD, i_c, i_h, heads, q_tokens, BY_HEAD)
        b_mean, b_variance, size = _moments(
            Q + i_b * q_stride_b + i_h * q_stride_h, p_q_table, VALID, i_row, q_tokens, q_stride_s, channel,
            BLOCK_Q, DIM, STEP_Q, Q_ORDER, False,
        )  # fmt: skip
        _store_split(QUERY + at * DIM, b_mean, channel, step, DIM)
        tl.store(QUERY + 2 * step + at * DIM + channel, b_variance.to(tl.bfloat16), mask=channel < DIM)


def _step(block: int, width: int, size: int) -> int:
    """Tokens that a program looks at together, of ``width`` channels of ``size`` bytes."""
    return min(_BYTES // (width * size), next_power_of_2(block))


def moments_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_q: int,
    block_k: int,
    orders: Sequence[Tensor | None],
    rows: Tensor | None,
    key_valid: Tensor | None,
) -> Moments:
    """Moments of all blocks of keys and values and of all or some of queries, in each order.

    Args:
        query: ``[B, H, Sq, D]``, last dimension contiguous.
        key: ``[B, H, Sk, D]``, last dimension contiguous.
        value: like ``key``.
        block_q: tokens in a query block.
        block_k: tokens in a key block.
        orders: table and heads of the queries, then of the keys, int32: each with ``heads`` ``[H]`` for one order, or
            without for all orders of the table.
        rows: int32 ``[R]``, the query blocks to look at; ``None`` for all.
        key_valid: bool ``[B, Sk]`` in natural order.
    """
    batch, heads, q_tokens, dim = query.shape
    k_tokens, width, each = key.shape[2], next_power_of_2(dim), query.element_size()
    q_table, q_head, k_table, k_head = orders
    count = 1 if k_head is not None or k_table is None else k_table.shape[0]
    q_count = blocks(q_tokens, block_q) if rows is None else rows.shape[0]
    k_count = blocks(k_tokens, block_k)
    q_shape, k_shape = (count, batch, heads, q_count), (count, batch, heads, k_count)
    made = [
        query.new_empty((parts, *shape, dim), dtype=torch.bfloat16)
        for parts, shape in ((3, q_shape), (3, k_shape), (2, k_shape))
    ]
    square, size = (query.new_empty(k_shape, dtype=torch.float32) for _ in range(2))
    launch(moments_kernel, (count * (2 * k_count + q_count), heads, batch))(
        query, key, value, *(query if x is None else x.contiguous() for x in (*orders, rows)),
        query if key_valid is None else key_valid.contiguous().view(torch.uint8), *made, square, size,
        q_tokens, k_tokens, q_count, k_count, count, *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        BLOCK_Q=block_q, BLOCK_K=block_k, DIM=dim, WIDTH=width, STEP_Q=_step(block_q, width, each),
        STEP_K=_step(block_k, width, each), Q_ORDER=q_table is not None, K_ORDER=k_table is not None,
        BY_HEAD=q_head is not None or k_head is not None, SOME=rows is not None, HAS_VALID=key_valid is not None,
        num_warps=_WARPS,
    )  # fmt: skip
    return Moments(made[0], made[1], made[2], square, size)


def _spec(dim: int, dtype: str, block_q: int, block_k: int, features: bool, by_head: bool) -> AotSpec:
    width = next_power_of_2(dim)
    constants = {"BLOCK_Q": block_q, "BLOCK_K": block_k, "DIM": dim, "WIDTH": width}
    each = 4 if dtype == "fp32" else 2
    constants |= {"STEP_Q": _step(block_q, width, each), "STEP_K": _step(block_k, width, each)}
    constants |= {"Q_ORDER": True, "K_ORDER": True, "BY_HEAD": by_head, "SOME": not by_head, "HAS_VALID": features}
    types = dict.fromkeys("QKV", f"*{dtype}") | dict.fromkeys(("QUERY", "KEY", "VALUE"), "*bf16")
    types |= dict.fromkeys(("Q_TABLE", "Q_HEAD", "K_TABLE", "K_HEAD", "AT"), "*i32") | {"VALID": "*u8"}
    types |= dict.fromkeys(("SQUARE", "SIZE"), "*fp32")
    names = moments_kernel.arg_names
    return AotSpec(
        name=f"spread_moments/d{dim}/{dtype}/{block_q}x{block_k}{'/valid' if features else ''}{'/heads' * by_head}",
        fn=moments_kernel,
        signature={name: "constexpr" if name in constants else types.get(name, "i32") for name in names},
        constexprs=constants,
        options={"num_warps": _WARPS},
        divisible_by_16=("Q", "K", "V", "QUERY", "KEY", "VALUE", *(n for n in names if "stride" in n)),
    )


AOT_SPECS = [
    _spec(128, "bf16", 128, 64, False, False),
    _spec(128, "bf16", 128, 64, False, True),
    _spec(64, "bf16", 64, 64, True, True),
    _spec(72, "fp32", 256, 100, True, False),
]
