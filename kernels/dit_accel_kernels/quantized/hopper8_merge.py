"""Merge attention to two sets of keys through their log-sum-exp, and give the log-sum-exp the share of the mean key back.

The 8-bit Hopper kernel attends to smoothed keys and has no pooled keys. So a remainder is a second, small attention in 16
bits, and this pass over the outputs weighs the two. It is bound by memory: two outputs and the queries are read once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import launch
from ..aot_spec import AotSpec

__all__ = ["AOT_SPECS", "add_mean", "merge", "merge_kernel"]

_ROWS = 32


@triton.jit(do_not_specialize=["tokens"])
def merge_kernel(
    q, mean, out, lse, other, other_lse, scale, tokens, q_b, q_h, q_s, out_b, out_h, out_s,
    other_b, other_h, other_s,
    DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, HAS_MEAN: tl.constexpr, HAS_OTHER: tl.constexpr,
):  # fmt: skip
    """One program: ROWS queries of one head. ``out`` and ``lse`` are read and written."""
    i_rows, i_h, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    head = i_b * tl.num_programs(1) + i_h
    row, channel = i_rows * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    inside = row < tokens
    mask = inside[:, None] & (channel < DIM)[None, :]
    token = row.to(tl.int64)[:, None]
    b_lse = tl.load(lse + head * tokens + row, mask=inside, other=0.0)
    if HAS_MEAN:
        b_q = tl.load(q + i_b * q_b + i_h * q_h + token * q_s + channel[None, :], mask=mask, other=0.0)
        b_mean = tl.load(mean + head * DIM + channel, mask=channel < DIM, other=0.0)
        b_lse += tl.sum(b_q.to(tl.float32) * b_mean[None, :], 1) * scale
    if HAS_OTHER:
        b_other = tl.load(other_lse + head * tokens + row, mask=inside, other=0.0)
        top = tl.maximum(b_lse, b_other)
        top = tl.where(top == float("-inf"), 0.0, top)
        one, two = tl.exp(b_lse - top), tl.exp(b_other - top)
        empty = one + two == 0.0
        total = tl.where(empty, 1.0, one + two)
        p_out = out + i_b * out_b + i_h * out_h + token * out_s + channel[None, :]
        p_other = other + i_b * other_b + i_h * other_h + token * other_s + channel[None, :]
        b_out = tl.load(p_out, mask=mask, other=0.0).to(tl.float32)
        b_more = tl.load(p_other, mask=mask, other=0.0).to(tl.float32)
        b_out = b_out * (one / total)[:, None] + b_more * (two / total)[:, None]
        tl.store(p_out, b_out.to(out.dtype.element_ty), mask=mask)
        b_lse = tl.where(empty, float("-inf"), top + tl.log(total))
    tl.store(lse + head * tokens + row, b_lse, mask=inside)


def _launch(
    q: Tensor,
    mean: Tensor | None,
    out: Tensor,
    lse: Tensor,
    other: Tensor | None,
    other_lse: Tensor | None,
    scale: float,
) -> None:
    batch, heads, tokens, dim = q.shape
    steps = (0, 0, 0) if other is None else other.stride()[:3]
    with torch.cuda.device_of(q):
        launch(merge_kernel, (-(-tokens // _ROWS), heads, batch))(
            *(q, mean, out, lse, other, other_lse, scale, tokens),
            *(*q.stride()[:3], *out.stride()[:3], *steps),
            DIM=dim,
            WIDTH=triton.next_power_of_2(dim),
            ROWS=_ROWS,
            HAS_MEAN=mean is not None,
            HAS_OTHER=other is not None,
            num_warps=4,
        )


def merge(
    q: Tensor, mean: Tensor | None, out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor, scale: float
) -> None:
    """Replace ``out`` and ``lse`` by those of attention to the keys of both.

    Args:
        q: ``[B, H, S, D]``, the queries.
        mean: float32 ``[B, H, D]``, what the keys of ``out`` lack, or ``None``.
        out: ``[B, H, S, D]``.
        lse: float32 ``[B, H, S]``, contiguous; minus infinity for rows without keys, whose output is 0.
        other: like ``out``, from other keys.
        other_lse: like ``lse``; its keys lack nothing.
        scale: factor of the logits.
    """
    _launch(q, mean, out, lse, other, other_lse, scale)


def add_mean(q: Tensor, mean: Tensor, lse: Tensor, scale: float) -> None:
    """Add ``scale * q . mean`` to ``lse``; arguments as of :func:`merge`."""
    _launch(q, mean, q, lse, None, None, scale)


def _spec(other: bool) -> AotSpec:
    optional = {"other": "*bf16", "other_lse": "*fp32"} if other else {}
    signature = {
        **dict.fromkeys(("q", "out"), "*bf16"),
        **dict.fromkeys(("mean", "lse"), "*fp32"),
        **optional,
        **dict.fromkeys(("tokens", *(f"{x}_{axis}" for x in ("q", "out", "other") for axis in "bhs")), "i32"),
        "scale": "fp32",
    }
    values: dict[str, int | bool | None] = {
        "DIM": 128,
        "WIDTH": 128,
        "ROWS": _ROWS,
        "HAS_MEAN": True,
        "HAS_OTHER": other,
    }
    values |= {} if other else {"other": None, "other_lse": None}
    return AotSpec(
        name=f"quantized_hopper/merge{'/other' * other}",
        fn=merge_kernel,
        signature={name: signature.get(name, "constexpr") for name in merge_kernel.arg_names},
        constexprs=values,
        options={"num_warps": 4},
        targets=("sm_90",),
    )


AOT_SPECS = [_spec(False), _spec(True)]
