"""Block-sparse attention of flash-attn-4 (CuTe DSL, Hopper and Blackwell): an optional backend.

It computes the blocks of the lists. A pooled remainder is added by the Triton kernel and joined by the log-sum-exps; calls
with windows, padding, gathered keys or a ragged last block are computed by the Triton kernel altogether.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..permute import permute_tokens, unpermute_tokens
from ..types import BlockLists, Pooled, TokenOrder

__all__ = ["block_sparse_flash4", "flash4_lists", "why_not_flash4"]

_BLOCK = 128


def _missing() -> str | None:
    """The module that is not there, or ``None``."""
    for module, package in (
        ("flash_attn", "flash-attn-4"),
        ("cutlass", "nvidia-cutlass-dsl"),
        ("quack", "quack-kernels"),
    ):
        if importlib.util.find_spec(module) is None:
            return f"{package} is not installed"
    if importlib.util.find_spec("flash_attn.cute") is None:
        return "flash-attn-4 is not installed (the flash_attn that is has no module cute)"
    return None


def why_not_flash4(
    *, device: torch.device, dtype: torch.dtype, head_dim: int, block_q: int, block_k: int
) -> str | None:
    """Say why flash-attn-4 cannot serve, or return ``None``; see :func:`dit_accel_kernels.backends.why_not`."""
    if (missing := _missing()) is not None:
        return missing
    if device.type != "cuda" or torch.version.hip is not None:
        return f"device must be an NVIDIA GPU, got {device}"
    major, minor = torch.cuda.get_device_capability(device)
    if major not in (9, 10):
        return f"compute capability must be 9.x or 10.x, got {major}.{minor}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"dtype must be bfloat16 or float16, got {dtype}"
    if head_dim not in (64, 96, 128):
        return f"head_dim must be 64, 96 or 128, got {head_dim}"
    for name, size in (("block_q", block_q), ("block_k", block_k)):
        if size != _BLOCK:
            return f"{name} must be {_BLOCK}, got {size}"
    return None


def flash4_lists(lists: BlockLists, kb: int) -> tuple[Tensor, Tensor]:
    """Number and ids of the blocks of each row, int32 ``[B|1, H|1, Qb]`` and ``[B|1, H|1, Qb, Kb]``.

    Partial blocks count as whole. Ids behind the end of a row are of other rows, below ``kb``, and nobody reads them.
    """
    count = lists.full if lists.partial is None else lists.full + lists.partial
    slot = lists.row_start[..., None] + torch.arange(kb, dtype=torch.int32, device=count.device)
    ids = lists.indices[slot.clamp(max=lists.indices.numel() - 1).long()]
    return count.contiguous(), ids.clamp(0, kb - 1).contiguous()


def block_sparse_flash4(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    *,
    scale: float,
    order: TokenOrder | None = None,
    pooled: Pooled | None = None,
    return_lse: bool = True,
    **other: Any,
) -> tuple[Tensor, Tensor]:
    """Compute what :func:`~.reference.block_sparse_reference` means with flash-attn-4.

    Arguments and results as of :attr:`dit_accel_kernels.backends.Backend.run`.
    """
    from ..dense import lse_merge
    from .launch import block_sparse_triton

    options: dict[str, Any] = {"scale": scale, "order": order, "return_lse": True}
    ragged = q.shape[2] % _BLOCK or k.shape[2] % _BLOCK
    if ragged or any(value is not None for value in other.values()):
        return block_sparse_triton(q, k, v, lists, pooled=pooled, **options, **other)
    moved = q if order is None else permute_tokens(q, order)
    out, lse = _blocks(moved, k, v, lists, scale)
    if order is not None:
        out, lse = unpermute_tokens(out, order), unpermute_tokens(lse[..., None].contiguous(), order)[..., 0]
    if pooled is not None:
        nothing = replace(lists, full=torch.zeros_like(lists.full), partial=None)
        out, lse = lse_merge(out, lse, *block_sparse_triton(q, k, v, nothing, pooled=pooled, **options))
    return torch.empty_like(q).copy_(out), lse


def _blocks(q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float) -> tuple[Tensor, Tensor]:
    """Blocks of the lists alone, in block order."""
    tensors = importlib.import_module("flash_attn.cute.block_sparsity").BlockSparseTensorsTorch
    attend = importlib.import_module("flash_attn.cute.interface")._flash_attn_fwd
    batch, heads = q.shape[:2]
    count, ids = flash4_lists(lists, k.shape[2] // _BLOCK)
    count = count.expand(batch, heads, -1).contiguous()
    ids = ids.expand(batch, heads, -1, -1).contiguous()
    sparse = tensors(torch.zeros_like(count), ids, count, ids, block_size=(_BLOCK, _BLOCK))
    out, lse = attend(
        *(x.transpose(1, 2) for x in (q, k, v)), softmax_scale=scale, block_sparse_tensors=sparse, return_lse=True
    )[:2]
    empty = (count == 0).repeat_interleave(_BLOCK, -1)  # what comes of rows without a block is not promised
    return (
        torch.where(empty[..., None], 0.0, out.transpose(1, 2)).to(q.dtype),
        torch.where(empty, -torch.inf, lse.to(torch.float32)),
    )
