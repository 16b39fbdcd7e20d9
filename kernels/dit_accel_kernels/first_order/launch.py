"""Launches of first-order terms: weights of some heads at a time, matrices of fewer, so that both stay small."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._common import blocks, next_power_of_2
from .._launch import capability, launch
from ..types import Pooled

__all__ = ["Turns", "add_first_order_triton"]

#: Bytes of covariances and matrices that are made at once: a seventh of what q, k, v and the output take, between these
#: limits. Two kernels do not pay to be started for less, nor is more quicker by much. And of weights.
_LEAST, _MOST, _WEIGHTS = 32 << 20, 96 << 20, 32 << 20


class Turns(NamedTuple):
    """How a call is divided.

    Attributes:
        weights: heads whose weights are made at once.
        planes: heads whose matrices are made at once.
        part: channels of values at once, all of them or a power of two.
    """

    weights: int
    planes: int
    part: int


def turns_of(rows: int, kb: int, dim: int, planes: int, itemsize: int, tensors: int) -> Turns:
    """Divide a call of ``planes`` heads of all batch elements; ``tensors`` are the bytes of q, k, v and the output."""
    part = dim if itemsize < 4 else min(dim, 32)  # products in float32 have small tiles
    room = max(_LEAST, min(_MOST, tensors // 7))

    def fits(part: int) -> int:
        return room // ((rows + kb) * dim * part * itemsize)

    while part > 32 and not fits(part):
        part = next_power_of_2(part) // 2
    at_once = max(1, min(planes, fits(part)))
    weights = max(1, _WEIGHTS // (rows * _pitch(kb) * itemsize) // at_once) * at_once
    return Turns(min(planes, weights), at_once, part)


def _pitch(kb: int) -> int:
    return -(-kb // 16) * 16


def _step(size: int, stride: int) -> int:
    return stride if size > 1 else 0


def _tiles(generation: int, kb: int, *, wide: bool) -> tuple[dict[str, Any], dict[str, int]]:
    """Tiles of the product over ``kb`` blocks, and launch options; ``wide``: float32."""
    if wide:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "TMA": False}, {"num_warps": 4, "num_stages": 2}
    if not 90 <= generation < 120:  # less shared memory behind that
        return {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 32, "TMA": False}, {"num_warps": 4, "num_stages": 3}
    if kb < 384:  # so many blocks fill up a tile badly, and a second program on a processor hides that the first stores
        return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "TMA": True}, {"num_warps": 4, "num_stages": 4}
    return {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "TMA": True}, {"num_warps": 8, "num_stages": 3}


class _Call(NamedTuple):
    """What all launches of a call share."""

    out: Tensor
    query: Tensor
    lse: Tensor
    key: Tensor
    value: Tensor
    pooled: Pooled
    table: Tensor | None
    head: Tensor | None
    valid: Tensor | None
    more: Tensor | None
    block_q: int
    block_k: int
    scale: float
    mean: Tensor
    lacks: Tensor
    middle: Tensor
    centre: Tensor

    @property
    def rows(self) -> int:
        return self.mean.shape[2]

    @property
    def kb(self) -> int:
        return self.pooled.k.shape[2]

    @property
    def heads(self) -> int:
        return self.query.shape[1]

    @property
    def wide(self) -> bool:
        return self.query.dtype == torch.float32

    @property
    def sizes(self) -> dict[str, Any]:
        """Compile-time sizes of a head, and how products are made."""
        dim = self.query.shape[3]
        precision = "ieee" if self.wide else "tf32"
        return {"DIM": dim, "WIDTH": max(16, next_power_of_2(dim)), "PRECISION": precision}

    @property
    def order(self) -> tuple[Tensor, Tensor]:
        """Table and rows of heads, or anything at all."""
        return (self.query, self.query) if self.table is None or self.head is None else (self.table, self.head)


def add_first_order_triton(
    out: Tensor, query: Tensor, lse: Tensor, key: Tensor, value: Tensor, pooled: Pooled, table: Tensor | None,
    head: Tensor | None, key_valid: Tensor | None, more: Tensor | None, block_q: int, block_k: int, scale: float,
    mean: Tensor, lacks: Tensor,
) -> None:  # fmt: skip
    """See :func:`dit_accel_kernels.first_order.add_first_order_`, with mean queries and what they lack at hand."""
    batch, heads, rows, dim = mean.shape
    middle = torch.empty(batch, heads, rows, dtype=torch.float32, device=query.device)
    centre = torch.empty(batch, heads, rows, dim, dtype=torch.float32, device=query.device)
    call = _Call(
        out, query, lse.contiguous(), key, value,
        Pooled(*(x.contiguous() for x in (pooled.k, pooled.v, pooled.bias, pooled.bits))),
        None if table is None else table.contiguous(), None if head is None else head.contiguous(),
        None if key_valid is None else key_valid.contiguous().view(torch.uint8), more,
        block_q, block_k, scale, mean, lacks, middle, centre,
    )  # fmt: skip
    kind = torch.float32 if call.wide else torch.bfloat16
    size = 4 * query.numel() * query.element_size()
    turns = turns_of(rows, call.kb, dim, batch * heads, kind.itemsize, size)

    def room(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=kind, device=query.device)

    weights = room(turns.weights, rows, _pitch(call.kb))
    covariances, matrices = (room(turns.planes, count, dim * turns.part) for count in (call.kb, rows))
    with torch.cuda.device_of(query):
        for first in range(0, batch * heads, turns.weights):
            last = min(first + turns.weights, batch * heads)
            _weights(call, weights, first, last)
            for some in range(first, last, turns.planes):
                planes = min(turns.planes, last - some)
                for turn in range(blocks(dim, turns.part)):
                    _covariances(call, covariances, some, planes, turn, turns.part)
                    _matrices(weights, covariances, matrices, some - first, planes, call)
                    _apply(call, matrices, some, planes, turn, turns.part)


def _weights(call: _Call, weights: Tensor, first: int, last: int) -> None:
    from .triton import weights_kernel

    bits, bias = call.pooled.bits, call.pooled.bias
    small = call.wide or call.query.shape[3] > 128
    block_m, block_n = (16, 16) if small else (16, 64)  # few blocks of queries for so many processors
    launch(weights_kernel, (blocks(call.rows, block_m), last - first))(
        call.mean, call.lse, *call.order, call.pooled.k, bias, bits, call.middle, weights, call.centre, call.scale,
        first, call.heads, call.query.shape[2], call.rows, call.kb, weights.shape[2],
        _step(bits.shape[0], bits.stride(0)), _step(bits.shape[1], bits.stride(1)),
        _step(bias.shape[0], bias.stride(0)), _step(bias.shape[1], bias.stride(1)),
        BLOCK=call.block_q, **call.sizes, BLOCK_M=block_m, BLOCK_N=block_n, STEP=min(32, next_power_of_2(call.block_q)),
        HAS_ORDER=call.table is not None, num_warps=4, num_stages=2,
    )  # fmt: skip


def _span(part: int, dim: int) -> int:
    """Channels of values that one program has."""
    return max(16, min(next_power_of_2(part), 128 if dim <= 128 else 64))


def _warps(width: int) -> int:
    return 8 if width >= 128 else 4


def _covariances(call: _Call, space: Tensor, first: int, planes: int, turn: int, part: int) -> None:
    from .triton import covariance_kernel

    key, value, sizes, span = call.key, call.value, call.sizes, _span(part, call.key.shape[3])
    launch(covariance_kernel, (call.kb, planes, blocks(part, span)))(
        key, value, call.pooled.k, key if call.valid is None else call.valid, space,
        first, call.heads, key.shape[2], call.kb, turn, *key.stride()[:3], *value.stride()[:3],
        BLOCK=call.block_k, **sizes, PART=part, SPAN=span,
        STEP=max(16, min(16 if call.wide else 64, next_power_of_2(call.block_k))), HAS_VALID=call.valid is not None,
        num_warps=_warps(sizes["WIDTH"]), num_stages=2,
    )  # fmt: skip


def _matrices(weights: Tensor, cov: Tensor, out: Tensor, here: int, planes: int, call: _Call) -> None:
    from .matrices import matrices_kernel

    rows, size = out.shape[1:]
    tiles, options = _tiles(capability(out), call.kb, wide=call.wide)
    given: tuple[Any, ...] = (weights, cov, out)
    if tiles["TMA"]:
        given = _described(weights, cov, out, planes, call.kb, tiles)
    grid = (blocks(rows, tiles["BLOCK_M"]) * blocks(size, tiles["BLOCK_N"]), planes)
    launch(matrices_kernel, grid)(
        *given, here, rows, call.kb, weights.shape[2], size,
        **tiles, PRECISION=call.sizes["PRECISION"], **options,
    )  # fmt: skip


def _described(
    weights: Tensor, cov: Tensor, out: Tensor, planes: int, kb: int, tiles: dict[str, Any]
) -> tuple[Any, ...]:
    """Descriptors: what is beyond the blocks reads as 0 and is not written."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    m, n, k = tiles["BLOCK_M"], tiles["BLOCK_N"], tiles["BLOCK_K"]
    rows, size, pitch = out.shape[1], out.shape[2], weights.shape[2]
    return (
        TensorDescriptor(weights, [weights.shape[0], rows, kb], [rows * pitch, pitch, 1], [1, m, k]),
        TensorDescriptor(cov, [planes, kb, size], [kb * size, size, 1], [1, k, n]),
        TensorDescriptor(out, [planes, rows, size], [rows * size, size, 1], [1, m, n]),
    )


def _apply(call: _Call, matrices: Tensor, first: int, planes: int, turn: int, part: int) -> None:
    from .triton import apply_kernel

    query, out, sizes, span = call.query, call.out, call.sizes, _span(part, call.query.shape[3])
    more = out if call.more is None else call.more
    block_m = max(16, min(16 if call.wide else 64, next_power_of_2(call.block_q)))
    launch(apply_kernel, (call.rows * blocks(call.block_q, block_m), planes, blocks(part, span)))(
        query, call.lse, *call.order, call.mean, call.middle, call.centre, call.lacks, matrices, more, out,
        first, call.heads, query.shape[2], call.rows, turn, *query.stride()[:3], *more.stride()[:3], *out.stride()[:3],
        BLOCK=call.block_q, **sizes, PART=part, SPAN=span, BLOCK_M=block_m,
        HAS_ORDER=call.table is not None, HAS_MORE=call.more is not None,
        num_warps=_warps(sizes["WIDTH"]), num_stages=2,
    )  # fmt: skip
