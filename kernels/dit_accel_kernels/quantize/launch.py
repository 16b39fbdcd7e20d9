"""From tensors to launches of the quantiser's Triton kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .._common import blocks
from .._launch import capability, launch
from ..block_sparse.hopper_launch import has_gluon
from ..types import TokenOrder
from .reference import hadamard_size
from .sample import Sample, sample_of
from .specs import tiles
from .triton import keys_kernel, mend_kernel, queries_kernel
from .types import LIMITS, Precision, QuantizedQKV, padded_dim, padded_keys

__all__ = ["quantize_triton"]

_MENDERS = 16  # programs a head
_NOT_MENDED = (
    *("k", "sums", "k_samples", "k_b", "k_h", "k_s", "KIND", "LIMIT", "STEPS", "NORM", "K_PARTS", "V_LIMIT"),
)
_DTYPES = {"int8": torch.int8, "int4": torch.uint8, "fp8": torch.float8_e4m3fn}


def quantize_triton(
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
    batch, heads, tokens, dim = k.shape
    width, kind = padded_dim(dim), precision.qk
    valid = None if key_valid is None else key_valid.contiguous().view(torch.uint8)
    columns = width // 2 if kind == "int4" else width

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty((batch, heads, *shape), dtype=dtype, device=k.device)

    with torch.cuda.device_of(q):
        made = QuantizedQKV(
            q=empty(q.shape[2], columns, dtype=_DTYPES[kind]),
            q_scale=empty(q.shape[2]),
            k=empty(tokens, columns, dtype=_DTYPES[kind]),
            k_scale=empty(blocks(tokens, block_k)),
            v=_empty_values(v, precision.pv, key_order, width),
            v_scale=torch.ones((batch, heads, width), device=k.device) if precision.pv == "bf16" else empty(width),
            k_mean=empty(dim) if precision.smooth_k else None,
            precision=precision,
            block_k=block_k,
        )
        _launch(q, k, v, made, order, key_order, valid)
    return made


def _empty_values(v: Tensor, kind: str, order: TokenOrder | None, width: int) -> Tensor:
    """16-bit values in their order, or room for codes."""
    if kind != "bf16":
        shape = (*v.shape[:2], width, padded_keys(v.shape[2]))
        return torch.empty(shape, dtype=_DTYPES[kind], device=v.device)
    if order is not None:
        from ..permute.triton import permute_triton

        return permute_triton(v, order.table, order.head, False)
    return v


def _shared(
    k: Tensor, v: Tensor, made: QuantizedQKV, key_order: TokenOrder | None, valid: Tensor | None, samples: _Samples
) -> dict[str, Any]:
    """Arguments that the first two launches have; the third has some of them."""
    dim, kind, width = k.shape[3], made.precision.qk, padded_dim(k.shape[3])
    size = hadamard_size(dim) if made.precision.rotate else 1
    pdl = capability(k) >= 90 and has_gluon()
    # Sums, largest magnitudes, and what is above them with a flag, in one piece of memory.
    counts = (samples.k_parts * width, samples.v_parts * width, (width + 8) * (samples.v_parts > 0))
    sizes = [k.shape[0] * k.shape[1] * count for count in counts]
    sums, tops, again = torch.empty(sum(sizes), device=k.device).split(sizes)
    args: dict[str, Any] = {
        "k": k, "v": v, "valid": valid, "k_table": None, "k_head": None, "sums": sums, "tops": tops, "again": again,
        "tokens": k.shape[2], "heads": k.shape[1], "k_samples": samples.keys.count,
        "k_b": k.stride(0), "k_h": k.stride(1), "k_s": k.stride(2),
        "v_b": v.stride(0), "v_h": v.stride(1), "v_s": v.stride(2),
        "DIM": dim, "WIDTH": width, "KIND": kind, "LIMIT": LIMITS[kind],
        "STEPS": size.bit_length() - 1, "NORM": size**-0.5, "HAS_ORDER": key_order is not None,
        "HAS_VALID": valid is not None, "K_PARTS": samples.k_parts, "V_PARTS": samples.v_parts,
        "ASM": capability(k) >= 90, "PDL": pdl, "enable_fp_fusion": False,
    }  # fmt: skip
    if key_order is not None:
        args |= {"k_table": key_order.table.contiguous(), "k_head": key_order.head.contiguous()}
    return args | ({"launch_pdl": True} if pdl else {})


class _Samples(NamedTuple):
    """Samples of keys and values, and their parts, 0 where nothing is asked of them."""

    keys: Sample
    values: Sample
    k_parts: int
    v_parts: int


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    made: QuantizedQKV,
    order: TokenOrder | None,
    key_order: TokenOrder | None,
    valid: Tensor | None,
) -> None:
    groups, tokens, pv = k.shape[0] * k.shape[1], k.shape[2], made.precision.pv
    has_values, key_blocks = pv != "bf16", made.k_scale.shape[2]
    first, second = tiles(padded_dim(k.shape[3]))
    keys, values = sample_of(tokens), sample_of(tokens, every=pv == "int8")
    samples = _Samples(keys, values, keys.parts * made.precision.smooth_k, values.parts * has_values)
    shared = _shared(k, v, made, key_order, valid, samples)
    launch(queries_kernel, (groups * (blocks(q.shape[2], first["Q_TILE"]) + samples.k_parts + samples.v_parts),))(
        q=q, q_table=None if order is None else order.table.contiguous(),
        q_head=None if order is None else order.head.contiguous(), q_out=made.q, q_scale=made.q_scale,
        q_tokens=q.shape[2], k_step=keys.step, v_samples=values.count, v_step=values.step,
        q_b=q.stride(0), q_h=q.stride(1), q_s=q.stride(2), HAS_Q_ORDER=order is not None, **shared, **first,
    )  # fmt: skip
    v_tiles = padded_keys(tokens) // second["V_TILE"] * has_values
    more: dict[str, Any] = {
        "v_out": made.v.view(torch.int32) if has_values else None, "v_scale": made.v_scale if has_values else None,
        "headroom": values.headroom, "least": values.least, "V_KIND": pv, "V_LIMIT": LIMITS.get(pv, 0.0),
    }  # fmt: skip
    launch(keys_kernel, (groups * (key_blocks + v_tiles),))(
        divisors=None if valid is None else valid[:, :: keys.step].sum(1).float().clamp(min=1),
        k_out=made.k, k_scale=made.k_scale, mean=made.k_mean, blocks=key_blocks, BLOCK=made.block_k,
        ROWS=triton.next_power_of_2(made.block_k), **shared, **more, **second,
    )  # fmt: skip
    if pv == "fp8" and values.headroom > 1:
        both = {name: x for name, x in (shared | more | second).items() if name not in _NOT_MENDED}
        launch(mend_kernel, (min(v_tiles, _MENDERS), groups))(**both)
