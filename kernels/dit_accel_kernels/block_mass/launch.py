"""Launches of the block mass and log-sum-exp kernels, and what to compile ahead of time."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from .._common import blocks, split_head_dim
from .._launch import describe, launch, takes_tma
from ..aot_spec import AotSpec
from .reference import query_rows
from .triton import attention_lse_kernel, block_mass_kernel

__all__ = ["AOT_SPECS", "attention_lse_triton", "block_mass_triton"]

_LOG2E = 1.4426950408889634
_TMA_TARGETS = ("sm_90", "sm_100")


def _tiles(dtype: torch.dtype, width: int, tma: bool) -> tuple[int, int, dict[str, int]]:
    """Rows and keys of a tile and the launch options; two or three programs share a multiprocessor."""
    if dtype == torch.float32:
        # Each operand is held twice, as its TF32 value and the remainder, so the tile must be small.
        return (32 if width <= 128 else 16), 64, {"num_warps": 8, "num_stages": 2}
    if width > 128:
        return 64, 64, {"num_warps": 4, "num_stages": 2}
    return 128, 64, {"num_warps": 4, "num_stages": 2 if tma else 3}


def _precision() -> str:
    """How float32 is multiplied; AMD's compiler knows no split into TF32."""
    return "ieee" if torch.version.hip is not None else "tf32x3"


def _keys(k: Tensor, rows: int, widths: tuple[int, int], tma: bool) -> tuple[Any, Any]:
    """The key arguments of a launch: two TMA descriptors, or the tensor twice."""
    if not tma:
        return k, k
    first = describe(k, rows, widths[0])
    return first, describe(k, rows, widths[1]) if widths[1] else first


def block_mass_triton(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
    rows: Tensor | None,
    table: Tensor | None,
    head: Tensor | None,
    key_valid: Tensor | None,
    step: int = 1,
) -> Tensor:
    """Softmax mass per block; see :func:`dit_accel_kernels.block_mass` for the arguments."""
    batch, heads, queries, dim = q.shape
    keys = k.shape[2]
    widths = split_head_dim(dim)
    tma = takes_tma(k)
    bm, bn, options = _tiles(q.dtype, sum(widths), tma)
    bn = min(bn, max(16, triton.next_power_of_2(block_k)))
    rows_each = min(bm, triton.next_power_of_2(block_q))
    parts = blocks(block_q, bm)
    count = blocks(queries, block_q * step) if rows is None else rows.shape[0]
    key_blocks = blocks(keys, block_k)
    out = torch.empty(batch, heads, count * parts, key_blocks, dtype=torch.float32, device=q.device)
    k0, k1 = _keys(k, bn, widths, tma)
    grid = (blocks(count * parts, bm // rows_each), heads, batch)
    with torch.cuda.device_of(q):
        launch(block_mass_kernel, grid)(
            q, k0, k1, lse.contiguous(),
            q if rows is None else rows.int().contiguous(),
            q if table is None else table.contiguous(),
            q if head is None else head.contiguous(),
            q if key_valid is None else key_valid.contiguous().view(torch.uint8),
            out, queries, keys, count * parts, key_blocks, scale * _LOG2E,
            *q.stride()[:3], *k.stride()[:3], keys,
            BLOCK_Q=block_q, STEP=step, BLOCK_K=block_k, DIM=dim, D0=widths[0], D1=widths[1], BM=bm, BN=bn,
            ROWS_EACH=rows_each, PARTS=parts, HAS_ROWS=rows is not None,
            HAS_ORDER=table is not None and head is not None, HAS_VALID=key_valid is not None,
            TMA=tma, PRECISION=_precision(),
            **options,
        )  # fmt: skip
    if parts == 1:
        return out
    # A query block larger than a tile comes back as sums over its parts.
    if rows is None:
        rows = torch.arange(count, device=q.device)
    token, inside = query_rows(rows, block_q, queries, table, head, step)
    row_lse = lse.gather(2, token.expand(heads, -1)[None].expand(batch, -1, -1))
    counted = (inside & (row_lse > float("-inf"))).view(batch, heads, count, block_q).sum(3)
    return out.view(batch, heads, count, parts, key_blocks).sum(3) / counted.clamp(min=1)[..., None]


def attention_lse_triton(q: Tensor, k: Tensor, scale: float, key_valid: Tensor | None) -> Tensor:
    """Natural-log normaliser of each query; see :func:`dit_accel_kernels.attention_lse` for the arguments."""
    batch, heads, queries, dim = q.shape
    keys = k.shape[2]
    widths = split_head_dim(dim)
    tma = takes_tma(k)
    bm, bn, options = _tiles(q.dtype, sum(widths), tma)
    out = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    k0, k1 = _keys(k, bn, widths, tma)
    with torch.cuda.device_of(q):
        launch(attention_lse_kernel, (blocks(queries, bm), heads, batch))(
            q, k0, k1, q if key_valid is None else key_valid.contiguous().view(torch.uint8), out,
            queries, keys, scale * _LOG2E, *q.stride()[:3], *k.stride()[:3], keys,
            DIM=dim, D0=widths[0], D1=widths[1], BM=bm, BN=bn, HAS_VALID=key_valid is not None,
            TMA=tma, PRECISION=_precision(),
            **options,
        )  # fmt: skip
    return out


def _specs(dim: int, dtype: str, features: bool, targets: tuple[str, ...]) -> list[AotSpec]:
    """Both kernels for one head size; ``features`` turns rows, order and ``key_valid`` on."""
    tma, amd = targets == _TMA_TARGETS, targets == ("gfx942",)
    widths = split_head_dim(dim)
    bm, bn, options = _tiles(torch.float32 if dtype == "fp32" else torch.bfloat16, sum(widths), tma)
    strides = ("qb", "qh", "qs", "kb", "kh", "ks")
    pointers = {name: f"*{dtype}" for name in ("Q", "K0", "K1")}
    if tma:
        pointers["K0"] = f"tensordesc<{dtype}[1, 1, {bn}, {widths[0]}]>"
        pointers["K1"] = f"tensordesc<{dtype}[1, 1, {bn}, {widths[1] or widths[0]}]>"
    tail = {f"stride_{name}": "i32" for name in strides} | {"stride_valid": "i32"}
    shape: dict[str, Any] = {
        "DIM": dim,
        "D0": widths[0],
        "D1": widths[1],
        "BM": bm,
        "BN": bn,
        "HAS_VALID": features,
        "TMA": tma,
    }
    shape["PRECISION"] = "ieee" if amd else "tf32x3"
    mass = shape | {"BLOCK_Q": 64, "STEP": 1, "BLOCK_K": 64, "ROWS_EACH": min(bm, 64), "PARTS": max(1, 64 // bm)}
    mass |= {"HAS_ROWS": features, "HAS_ORDER": features}
    ints = {"LSE": "*fp32", "ROWS": "*i32", "TABLE": "*i32", "HEAD": "*i32", "VALID": "*u8", "OUT": "*fp32"}
    counts = {name: "i32" for name in ("queries", "keys", "entries", "key_blocks")} | {"scale2": "fp32"}
    mass_signature = pointers | ints | counts | tail
    lse_signature = (
        pointers | {"VALID": "*u8", "OUT": "*fp32", "queries": "i32", "keys": "i32", "scale2": "fp32"} | tail
    )
    suffix = f"d{dim}/{dtype}{'/tma' if tma else '/amd' if amd else ''}{'/order+valid' if features else ''}"
    aligned = tuple(name for name in ("Q", "K0", "K1") if pointers[name].startswith("*"))
    aligned += tuple(f"stride_{name}" for name in strides)
    return [
        AotSpec(
            name=f"{name}/{suffix}",
            fn=fn,
            signature=signature | {key: "constexpr" for key in constexprs},
            constexprs=constexprs,
            options=options,
            targets=targets,
            max_spill_bytes=1024 if dtype == "fp32" else 0,
            divisible_by_16=aligned,
        )
        for name, fn, signature, constexprs in (
            ("block_mass", block_mass_kernel, mass_signature, mass),
            ("attention_lse", attention_lse_kernel, lse_signature, shape),
        )
    ]


AOT_SPECS = [
    spec
    for dim, dtype, features in (
        (128, "bf16", False),
        (72, "bf16", True),
        (64, "fp16", False),
        (256, "bf16", False),
        (128, "fp32", True),
    )
    for targets in (("sm_80", "sm_89"), _TMA_TARGETS, ("gfx942",))
    for spec in _specs(dim, dtype, features, targets)
]
