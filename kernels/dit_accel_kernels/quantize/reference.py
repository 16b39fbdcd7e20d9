"""The meaning of the quantiser, in plain torch and exact to the bit: float32 arithmetic, ties to even.

Only sums, products and one reciprocal occur, each rounded once: what a compiler may fuse into a multiply-add is kept apart.
The mean key is made of float64 sums, which for 16-bit inputs do not depend on the order of their terms.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .._common import blocks
from ..types import TokenOrder
from .packing import pack_int4, to_operand_order
from .sample import sample_of
from .types import LIMITS, Precision, QuantizedQKV, padded_dim, padded_keys

__all__ = ["SMALLEST", "hadamard", "hadamard_size", "key_mean", "quantize_reference", "scales"]

# Groups without a magnitude above this count as zero: their reciprocals would overflow.
SMALLEST = 2.0**-100


def hadamard_size(head_dim: int) -> int:
    """Columns of a block of the rotation: the largest power of two up to 128 that divides ``head_dim``."""
    return min(head_dim & -head_dim, 128)


def hadamard(x: Tensor, size: int) -> Tensor:
    """Multiply each run of ``size`` channels by the orthonormal Hadamard matrix in natural order.

    Args:
        x: float32 ``[..., D]``.
        size: a power of two that divides ``D``.

    Returns:
        float32 ``[..., D]``, every sum rounded in the order of the fast transform, neighbours first.
    """
    half = 1
    while half < size:
        a, b = x.unflatten(-1, (-1, 2, half)).unbind(-2)
        x = torch.stack([a + b, a - b], -2).flatten(-3)
        half *= 2
    return x * size**-0.5


def key_mean(k: Tensor, key_valid: Tensor | None) -> Tensor:
    """Mean of sampled keys of each head, float32 ``[B, H, D]``: of all up to 4,095 tokens, see :mod:`.sample`.

    Invalid keys do not count; elements that are not finite count as 0. The softmax is the same whatever is subtracted.
    """
    sample = sample_of(k.shape[2])
    wide = _finite(k[:, :, :: sample.step].double())
    count = torch.full((k.shape[0],), float(sample.count), device=k.device)
    if key_valid is not None:
        there = key_valid[:, :: sample.step]
        wide = wide.masked_fill(~there[:, None, :, None], 0)
        count = there.sum(1).float().clamp(min=1)
    total = torch.zeros(*k.shape[:2], k.shape[3], device=k.device)
    for part in wide.split(blocks(sample.count, sample.parts), 2):
        total = total + part.sum(2).float()
    return total * count.reciprocal()[:, None, None]


def _channel_tops(wide: Tensor) -> Tensor:
    """What the largest magnitudes of the channels are taken for, of values ``[B, H, S, Dp]``."""
    sample = sample_of(wide.shape[2])
    top = wide.abs().amax(2)
    if sample.headroom == 1:
        return top
    most = wide[:, :, :: sample.step].abs().amax(2) * sample.headroom
    return most.clamp(sample.least, torch.finfo(torch.float32).max).maximum(top)


def quantize_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    precision: Precision,
    block_k: int,
    order: TokenOrder | None,
    key_order: TokenOrder | None,
    key_valid: Tensor | None,
) -> QuantizedQKV:
    """Quantise; see :func:`dit_accel_kernels.quantize.quantize_qkv`. Orders of ``None`` leave the tokens where they are."""
    dim, limit = q.shape[-1], LIMITS[precision.qk]
    width = padded_dim(dim)
    mean = None
    wide_q, wide_k = _moved(q, order).float(), _moved(k, key_order).float()
    if precision.smooth_k:
        mean = key_mean(_moved(k, key_order), key_valid)
        wide_k = wide_k - mean[:, :, None]
    wide_q, wide_k = (_prepared(x, precision.rotate, width) for x in (wide_q, wide_k))
    if key_valid is not None:
        wide_k = wide_k.masked_fill(~key_valid[:, None, :, None], 0)
    q_codes, q_scale = _codes(wide_q[:, :, :, None], limit)
    tokens, count = k.shape[2], blocks(k.shape[2], block_k)
    padded = F.pad(wide_k, (0, 0, 0, count * block_k - tokens)).unflatten(2, (count, block_k))
    k_codes, k_scale = _codes(padded, limit)
    q_codes, k_codes = q_codes[:, :, :, 0], k_codes.flatten(2, 3)[:, :, :tokens]
    if precision.qk == "int4":
        q_codes, k_codes = pack_int4(q_codes), pack_int4(k_codes)
    values, v_scale = _values(v, precision.pv, key_order, key_valid, width)
    # Elementwise operations keep the layout of the model, kernels want rows side by side.
    q_codes, q_scale, k_codes, k_scale = (x.contiguous() for x in (q_codes, q_scale, k_codes, k_scale))
    return QuantizedQKV(q_codes, q_scale, k_codes, k_scale, values, v_scale.contiguous(), mean, precision, block_k)


def scales(top: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """Scales and the factors that make codes, of groups with the largest magnitudes ``top``, float32.

    A group of zeros has scale 1 and factor 0.
    """
    empty = top < SMALLEST
    inverse = torch.where(empty, 0.0, torch.where(empty, 1.0, top).reciprocal() * limit)
    return torch.where(empty, 1.0, top * (1.0 / limit)), inverse


def octaves(top: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and factors as of :func:`scales` that are powers of two: e4m3 codes are below 256 and lose nothing."""
    empty = top < SMALLEST
    _, place = torch.where(empty, 1.0, top).frexp()  # 1 and above up to 2 have place 1
    one = torch.ones_like(top)
    return torch.where(empty, 1.0, one.ldexp(place - 8)), torch.where(empty, 0.0, one.ldexp(8 - place))


def _values(
    v: Tensor, kind: str, order: TokenOrder | None, key_valid: Tensor | None, width: int
) -> tuple[Tensor, Tensor]:
    """Values as :class:`QuantizedQKV` has them, and their scales."""
    moved = _moved(v, order)
    if kind == "bf16":
        return moved, torch.ones(*v.shape[:2], width, dtype=torch.float32, device=v.device)
    wide = _finite(F.pad(moved.float(), (0, width - v.shape[3])))
    if key_valid is not None:
        wide = wide.masked_fill(~key_valid[:, None, :, None], 0)
    top = None if kind == "int8" else _channel_tops(wide)
    codes, scale = _codes(wide.mT[:, :, :, None], LIMITS[kind], top)
    flat = codes[:, :, :, 0].view(torch.uint8)
    flat = F.pad(flat, (0, padded_keys(v.shape[2]) - v.shape[2]))
    return to_operand_order(flat).contiguous().view(codes.dtype), scale


def _prepared(x: Tensor, rotate: bool, width: int) -> Tensor:
    """Finite, rotated if asked for, and padded with zero columns; float32."""
    x = _finite(x)
    if rotate:
        x = _finite(hadamard(x, hadamard_size(x.shape[-1])))
    return F.pad(x, (0, width - x.shape[-1]))


def _codes(x: Tensor, limit: float, top: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes of float32 ``[..., N, D]`` and one scale for each ``[N, D]``; ``limit`` tells the format.

    With ``top``, which no magnitude exceeds, scales are powers of two.
    """
    scale, inverse = scales(x.abs().amax((-1, -2)), limit) if top is None else octaves(top)
    codes = x * inverse[..., None, None]
    if limit == LIMITS["fp8"]:
        return codes.clamp(-limit, limit).to(torch.float8_e4m3fn), scale
    return codes.round().clamp(-limit, limit).to(torch.int8), scale


def _finite(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x, 0.0)


def _moved(x: Tensor, order: TokenOrder | None) -> Tensor:
    if order is None:
        return x
    index = order.table[order.head.long()].long()[None, :, :, None]
    return x.gather(2, index.expand(x.shape))
