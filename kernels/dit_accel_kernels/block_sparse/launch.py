"""From tensors to a launch of the Triton kernel: strides, tile shape and tensor descriptors."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from .._common import split_head_dim
from .._launch import describe, launch
from ..types import BlockLists, GatheredKeys, Pooled, TokenOrder, TokenWindows
from .arguments import gathered_args, list_args, pooled_args
from .configs import TileConfig, gather_tile, tile_config
from .near import window_bits
from .triton import block_sparse_fwd_kernel

__all__ = ["block_sparse_triton", "gpu_arch", "tma_reason"]

# Offsets within a tile of up to 256 tokens are 32-bit.
_MAX_TOKEN_STRIDE = 2**31 // 256 - 1


def block_sparse_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    *,
    scale: float,
    order: TokenOrder | None = None,
    pooled: Pooled | None = None,
    windows: TokenWindows | None = None,
    key_valid: Tensor | None = None,
    gathered: GatheredKeys | None = None,
    return_lse: bool = True,
    config: TileConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute what :func:`~.reference.block_sparse_reference` means on a GPU, or in Triton's interpreter.

    Args:
        q: ``[B, H, Sq, D]``, natural order.
        k: ``[B, H, Sk, D]``, block order.
        v: ``[B, H, Sk, D]``, block order.
        lists: blocks that each query block visits.
        scale: positive factor of the logits.
        order: order of the queries.
        pooled: what stands for the blocks that are not visited.
        windows: token windows of partial blocks; without them partial blocks are whole.
        key_valid: bool ``[B, Sk]``, false for padding, which must be finite: descriptor loads cannot mask it.
        gathered: further keys, of which each query block sees some groups.
        return_lse: compute the log-sum-exp; otherwise an empty tensor stands for it.
        config: shape of a program, to tune or test; by default from the table, without tensor descriptors where
            they cannot be used.

    Returns:
        The output with the strides and dtype of ``q``, and the log-sum-exp, float32 ``[B, H, Sq]``.

    Raises:
        ValueError: tokens lie too far apart, or ``config`` asks for descriptors that cannot be had.
    """
    batch, heads, sq, dim = q.shape
    sk = k.shape[2]
    for name, x in (("k", k), ("v", v)):
        if x.stride(2) > _MAX_TOKEN_STRIDE:
            raise ValueError(f"the token stride of {name} must be at most {_MAX_TOKEN_STRIDE}, got {x.stride(2)}")
    arch = _arch(q.device)
    reason = tma_reason(k, v, arch)
    if config is None:
        gpu = _gpu(q.device) if q.is_cuda else None
        config = tile_config(arch, dim, q.element_size(), lists.block_q, lists.block_k, gpu=gpu)
    elif config.tma and reason is not None:
        raise ValueError(f"tensor descriptors cannot be used: {reason}")
    if lists.block_q % config.block_m or lists.block_k % config.block_n:
        raise ValueError(f"{config} does not divide blocks of {lists.block_q} and {lists.block_k} tokens")
    use_tma = config.tma and reason is None
    d0, d1 = split_head_dim(dim)
    out = torch.empty_like(q)
    lse = torch.empty((batch, heads, sq) if return_lse else (0,), dtype=torch.float32, device=q.device)
    args: dict[str, Any] = {"q": q, "out": out, "lse": lse if return_lse else None, "scale": scale}
    args |= (
        list_args(lists)
        | _order_args(order)
        | pooled_args(pooled)
        | _window_args(windows, config.block_n)
        | gathered_args(gathered)
    )
    args["key_valid"] = None if key_valid is None else key_valid.contiguous().view(torch.uint8)
    tiled: dict[str, Tensor | None] = {"k": k, "v": v, "pool_k": None, "pool_v": None}
    if pooled is not None:
        tiled |= {"pool_k": pooled.k.contiguous(), "pool_v": pooled.v.contiguous()}
    for name, tensor in {"q": q, "out": out, **tiled}.items():
        args |= {f"{name}_{axis}": n for axis, n in zip("bhs", (0, 0, 0) if tensor is None else tensor.stride())}
    for name, tensor in tiled.items():
        args |= _tiles(name, tensor, config.block_n, (d0, d1) if use_tma else None)
    grid = (-(-sq // config.block_m), heads, batch)
    with _on(q.device):
        launch(block_sparse_fwd_kernel, grid)(
            **args,
            sq=sq,
            sk=sk,
            D=dim,
            D0=d0,
            D1=d1,
            BLOCK_Q=lists.block_q,
            BLOCK_K=lists.block_k,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            TMA=use_tma,
            PRECISION=_precision(arch, q.dtype),
            EVEN_K=sk % lists.block_k == 0,
            HAS_PARTIAL=lists.partial is not None,
            HAS_WINDOWS=windows is not None,
            HAS_VALID=key_valid is not None,
            HAS_ORDER=order is not None,
            HAS_POOLED=pooled is not None,
            HAS_LSE=return_lse,
            HAS_GATHERED=gathered is not None,
            GROUP=1 if gathered is None else gathered.group,
            BLOCK_G=gather_tile(config),
            NEAR_WINDOWS=args["k_base"] is not None,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out, lse


def tma_reason(k: Tensor, v: Tensor, arch: str) -> str | None:
    """Say why tensor descriptors cannot read ``k`` and ``v``, or return ``None``.

    Args:
        k: ``[B, H, Sk, D]``.
        v: ``[B, H, Sk, D]``.
        arch: as in :func:`~.configs.tile_config`.
    """
    if arch != "interpreter" and not (arch.startswith("sm_") and int(arch[3:]) >= 90):
        return f"the architecture must be sm_90 or newer, got {arch}"
    for name, x in (("k", k), ("v", v)):
        size = x.element_size()
        strides = [s * size for n, s in zip(x.shape[:3], x.stride()[:3]) if n > 1]
        strides += [x.shape[3] * size]  # the pooled keys are contiguous
        if x.data_ptr() % 16 or any(s % 16 or s <= 0 for s in strides):
            return f"{name} must have addresses and strides that are multiples of 16 bytes, got strides {strides}"
    return None


def _tiles(name: str, x: Tensor | None, block_n: int, split: tuple[int, int] | None) -> dict[str, Any]:
    """The argument ``name`` and, for the second part of the head size, ``name_hi``: a tensor or two descriptors."""
    if x is None or split is None:
        return {name: x, f"{name}_hi": None}
    low, high = (describe(x, block_n, width) if width else None for width in split)
    return {name: low, f"{name}_hi": high}


def _order_args(order: TokenOrder | None) -> dict[str, Any]:
    if order is None:
        return {"table": None, "head_row": None}
    return {"table": order.table.contiguous(), "head_row": order.head.contiguous()}


def _window_args(windows: TokenWindows | None, tile: int) -> dict[str, Any]:
    """Bounds of the queries, and codes of the keys or, where they are near, bits and the bases of their tiles."""
    if windows is None:
        return {"q_lo": None, "q_hi": None, "k_code": None, "k_base": None}
    found = window_bits(windows.k_code, tile)
    bits, base = (windows.k_code.contiguous(), None) if found is None else found
    return {"q_lo": windows.q_lo.contiguous(), "q_hi": windows.q_hi.contiguous(), "k_code": bits, "k_base": base}


def _precision(arch: str, dtype: torch.dtype) -> str:
    if dtype != torch.float32:
        return "tf32"  # ignored: it says how float32 operands are multiplied
    return "tf32x3" if arch.startswith("sm_") else "ieee"


def _arch(device: torch.device) -> str:
    if device.type == "cpu" or os.environ.get("TRITON_INTERPRET") == "1":
        return "interpreter"
    return gpu_arch(device)


@lru_cache(maxsize=64)
def _gpu(device: torch.device) -> tuple[str, str]:
    return torch.cuda.get_device_name(device), triton.__version__


@lru_cache(maxsize=64)
def gpu_arch(device: torch.device) -> str:
    """The architecture of a GPU as in :func:`~.configs.tile_config`."""
    if torch.version.hip is not None:
        return "hip"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Make ``device`` current: Triton launches on the current one, whatever its arguments are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
