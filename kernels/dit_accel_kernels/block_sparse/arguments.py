"""Kernel arguments that the portable and the Hopper kernel share. Imports no triton."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..types import BlockLists, GatheredKeys, Pooled

__all__ = ["gathered_args", "list_args", "pooled_args"]


def _broadcast(x: Tensor) -> tuple[int, int]:
    """Strides of a contiguous tensor's first two dimensions, 0 where it is shared."""
    return (x.stride(0) if x.shape[0] > 1 else 0, x.stride(1) if x.shape[1] > 1 else 0)


def list_args(lists: BlockLists) -> dict[str, Any]:
    """The block lists, with strides of 0 where batch elements or heads share them."""
    row_start = lists.row_start.contiguous()
    batch, head = _broadcast(row_start)
    return {
        "row_start": row_start,
        "full": lists.full.contiguous(),
        "partial": None if lists.partial is None else lists.partial.contiguous(),
        "indices": lists.indices.contiguous(),
        "list_b": batch,
        "list_h": head,
    }


def pooled_args(pooled: Pooled | None) -> dict[str, Any]:
    """Bias and bits of the remainder; its means are passed as tiles."""
    if pooled is None:
        return dict.fromkeys(("bias", "bits")) | dict.fromkeys(("bits_b", "bits_h", "bias_b", "bias_h"), 0)
    bias, bits = pooled.bias.contiguous(), pooled.bits.contiguous()
    args: dict[str, Any] = {"bias": bias, "bits": bits}
    args["bits_b"], args["bits_h"] = _broadcast(bits)
    args["bias_b"], args["bias_h"] = _broadcast(bias)
    return args


def gathered_args(gathered: GatheredKeys | None) -> dict[str, Any]:
    """All of the gathered keys but the size of a group; without any, values that compile one kernel."""
    names = ("k", "v", "bias", "start", "count", "indices")
    steps = ("k_b", "k_h", "k_s", "v_b", "v_h", "v_s", "list_b", "list_h", "bias_b", "bias_h")
    if gathered is None:
        return dict.fromkeys(f"more_{name}" for name in names) | dict.fromkeys(
            [*(f"more_{name}" for name in steps), "se"], 0
        )
    bias, row_start = gathered.bias.contiguous(), gathered.row_start.contiguous()
    count, indices = gathered.count.contiguous(), gathered.indices.contiguous()
    values = (gathered.k, gathered.v, bias, row_start, count, indices)
    strides = (*gathered.k.stride()[:3], *gathered.v.stride()[:3], *_broadcast(row_start), *_broadcast(bias))
    args = dict(zip((f"more_{name}" for name in (*names, *steps)), (*values, *strides), strict=True))
    return args | {"se": gathered.k.shape[2]}
