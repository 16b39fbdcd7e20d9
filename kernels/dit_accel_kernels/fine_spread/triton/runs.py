"""Means of runs of a few queries and keys in block order, in Triton."""

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

__all__ = ["AOT_SPECS", "PAD", "Runs", "runs_triton"]

PAD = 128  # rows of means are a multiple of it, so that nobody has to mask what he reads
_ROWS, _WARPS = 8, 1  # of a program: many small ones with many loads each are fastest


class Runs(NamedTuple):
    """What :func:`runs_triton` returns; rows behind the last run are 0 and hold no token.

    Attributes:
        query: ``[B, H, Nq, W]`` in the type of the inputs, means, with ``W`` the next power of two of the head size.
        key: ``[B, H, Nk, W]``.
        size: float32 ``[B, H, Nk]``, log2 of the number of valid keys.
    """

    query: Tensor
    key: Tensor
    size: Tensor


@triton.jit
def _run_means(
    base, p_table, p_valid, out, p_size, first, tokens, stride_s,
    RUN: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, HAS_ORDER: tl.constexpr,
    HAS_VALID: tl.constexpr, SIZED: tl.constexpr,
):  # fmt: skip
    """Means of ROWS runs from run ``first`` on; the i-th tokens of all of them are read together."""
    channel = tl.arange(0, WIDTH)
    row = tl.arange(0, ROWS)
    b_sum = tl.zeros([ROWS, WIDTH], tl.float32)
    size = tl.zeros([ROWS], tl.float32)
    for i in tl.static_range(RUN):
        token = (first + row) * RUN + i
        counts = token < tokens
        if HAS_ORDER:
            token = tl.load(p_table + token, mask=counts, other=0)
        if HAS_VALID:
            counts = counts & (tl.load(p_valid + token, mask=counts, other=0) != 0)
        # [ROWS, WIDTH]
        p_x = base + token.to(tl.int64)[:, None] * stride_s + channel[None, :]
        b_sum += tl.load(p_x, mask=counts[:, None] & (channel[None, :] < DIM), other=0.0).to(tl.float32)
        size += counts.to(tl.float32)
    b_mean = b_sum / tl.maximum(size, 1.0)[:, None]
    tl.store(out + row[:, None] * WIDTH + channel[None, :], b_mean.to(out.dtype.element_ty))
    if SIZED:
        tl.store(p_size + row, tl.log2(size))


# Counts are not specialised: another number of tokens must not compile another kernel.
@triton.jit(do_not_specialize=["q_tokens", "k_tokens", "q_rows", "k_rows"])
def runs_kernel(
    Q, K, Q_TABLE, Q_HEAD, K_TABLE, K_HEAD, VALID, QUERY, KEY, SIZE, q_tokens, k_tokens, q_rows, k_rows,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s,
    RUN: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, Q_ORDER: tl.constexpr,
    K_ORDER: tl.constexpr, HAS_VALID: tl.constexpr,
):  # fmt: skip
    """One program: ROWS runs of the keys of a head, or of its queries."""
    i_h, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i_map = i_b * tl.num_programs(1) + i_h
    entry = tl.program_id(0)
    of_keys = k_rows // ROWS
    if entry < of_keys:
        first = entry * ROWS
        p_table = K_TABLE
        if K_ORDER:
            p_table = K_TABLE + tl.load(K_HEAD + i_h).to(tl.int64) * k_tokens
        at = i_map * k_rows + first
        _run_means(
            K + i_b * k_stride_b + i_h * k_stride_h, p_table, VALID + i_b * k_tokens, KEY + at * WIDTH, SIZE + at,
            first, k_tokens, k_stride_s, RUN, ROWS, DIM, WIDTH, K_ORDER, HAS_VALID, True,
        )  # fmt: skip
    else:  # another name for the table: without an order it is of another type
        first = (entry - of_keys) * ROWS
        p_q_table = Q_TABLE
        if Q_ORDER:
            p_q_table = Q_TABLE + tl.load(Q_HEAD + i_h).to(tl.int64) * q_tokens
        at = i_map * q_rows + first
        _run_means(
            Q + i_b * q_stride_b + i_h * q_stride_h, p_q_table, VALID, QUERY + at * WIDTH, SIZE,
            first, q_tokens, q_stride_s, RUN, ROWS, DIM, WIDTH, Q_ORDER, False, False,
        )  # fmt: skip


def runs_triton(
    query: Tensor, key: Tensor, tokens: int, orders: Sequence[Tensor | None], key_valid: Tensor | None
) -> Runs:
    """Means of runs of ``tokens`` queries and keys.

    Args:
        query: 16-bit ``[B, H, Sq, D]``, last dimension contiguous.
        key: ``[B, H, Sk, D]``, the same.
        tokens: tokens of a run, a power of two up to 32.
        orders: table and heads of the queries, then of the keys.
        key_valid: bool ``[B, Sk]`` in natural order.
    """
    batch, heads, queries, dim = query.shape
    width = next_power_of_2(dim)
    q_rows, k_rows = (blocks(blocks(n, tokens), PAD) * PAD for n in (queries, key.shape[2]))
    made = [query.new_empty((batch, heads, n, width)) for n in (q_rows, k_rows)]
    size = query.new_empty((batch, heads, k_rows), dtype=torch.float32)
    launch(runs_kernel, ((q_rows + k_rows) // _ROWS, heads, batch))(
        query, key, *(query if x is None else x.contiguous() for x in orders),
        query if key_valid is None else key_valid.contiguous().view(torch.uint8), *made, size,
        queries, key.shape[2], q_rows, k_rows, *query.stride()[:3], *key.stride()[:3],
        RUN=tokens, ROWS=_ROWS, DIM=dim, WIDTH=width, Q_ORDER=orders[0] is not None, K_ORDER=orders[2] is not None,
        HAS_VALID=key_valid is not None, num_warps=_WARPS,
    )  # fmt: skip
    return Runs(made[0], made[1], size)


def _spec(dim: int, dtype: str, run: int, features: bool, q_order: bool = True) -> AotSpec:
    width = next_power_of_2(dim)
    constants = {"RUN": run, "ROWS": _ROWS, "DIM": dim, "WIDTH": width}
    constants |= {"Q_ORDER": q_order, "K_ORDER": True, "HAS_VALID": features}
    types = dict.fromkeys(("Q", "K", "QUERY", "KEY"), f"*{dtype}") | {"VALID": "*u8", "SIZE": "*fp32"}
    types |= dict.fromkeys(("Q_TABLE", "Q_HEAD", "K_TABLE", "K_HEAD"), "*i32")
    types |= {} if q_order else dict.fromkeys(("Q_TABLE", "Q_HEAD"), types["Q"])  # as it is called
    names = runs_kernel.arg_names
    return AotSpec(
        name=f"fine_spread_runs/d{dim}/{dtype}/{run}{'/valid' if features else ''}{'' if q_order else '/keys'}",
        fn=runs_kernel,
        signature={name: "constexpr" if name in constants else types.get(name, "i32") for name in names},
        constexprs=constants,
        options={"num_warps": _WARPS},
        divisible_by_16=("Q", "K", "QUERY", "KEY", *(n for n in names if "stride" in n)),
    )


AOT_SPECS = [_spec(128, "bf16", 8, False), _spec(72, "fp16", 4, True), _spec(64, "bf16", 8, False, False)]
