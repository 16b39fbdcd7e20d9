"""From quantised tensors to a launch of the Triton kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._launch import describe, launch
from ..block_sparse.arguments import list_args, pooled_args
from ..block_sparse.configs import TileConfig
from ..block_sparse.launch import _arch, tma_reason
from ..quantize import QuantizedQKV
from ..types import BlockLists, Pooled, TokenOrder
from .configs import pooled_tile, tile_config
from .triton import quantized_fwd_kernel

__all__ = ["quantized_triton"]


def quantized_triton(
    q: Tensor,
    made: QuantizedQKV,
    lists: BlockLists,
    *,
    scale: float,
    order: TokenOrder | None = None,
    pooled: Pooled | None = None,
    key_valid: Tensor | None = None,
    return_lse: bool = True,
    config: TileConfig | None = None,
    two_level: bool = True,
) -> tuple[Tensor, Tensor]:
    """Compute what :func:`~.reference.quantized_reference` means on a GPU, or in Triton's interpreter.

    Args:
        q: ``[B, H, Sq, D]`` 16-bit, natural order: for pooled keys, the log-sum-exp and the layout of the output.
        made: the quantised tensors.
        lists: blocks that each query block visits; partial blocks are whole.
        scale: positive factor of the logits.
        order: order of the queries.
        pooled: what stands for the blocks that are not visited.
        key_valid: bool ``[B, Sk]``, false for padding, whose 16-bit values must be finite.
        return_lse: compute the log-sum-exp; otherwise an empty tensor stands for it.
        config: shape of a program, to tune or test.
        two_level: keep sums of e4m3 products across tiles in float32 registers.

    Returns:
        The output with the strides and dtype of ``q``, and the log-sum-exp, float32 ``[B, H, Sq]``.
    """
    made = made.unpacked()
    batch, heads, sq, dim = q.shape
    sk, width = made.k.shape[2:]
    half, arch = made.precision.pv == "bf16", _arch(q.device)
    if config is None:
        config = tile_config(arch, width, made.precision.pv, lists.block_q, lists.block_k)
    if lists.block_q % config.block_m or lists.block_k % config.block_n:
        raise ValueError(f"{config} does not divide blocks of {lists.block_q} and {lists.block_k} tokens")
    wide = [] if pooled is None else [pooled.k.contiguous(), pooled.v.contiguous()]
    use_tma = config.tma and all(tma_reason(x, x, arch) is None for x in _descriptors(made, wide))
    out = torch.empty_like(q)
    lse = torch.empty((batch, heads, sq) if return_lse else (0,), dtype=torch.float32, device=q.device)
    args: dict[str, Any] = {name: getattr(made, name) for name in ("q_scale", "k_scale", "v_scale", "k_mean")}
    args |= {"q_codes": made.q, "q": q, "out": out, "lse": lse if return_lse else None, "scale": scale}
    args |= {
        "table": None if order is None else order.table.contiguous(),
        "head_row": None if order is None else order.head.contiguous(),
        "key_valid": None if key_valid is None else key_valid.contiguous().view(torch.uint8),
    }
    args |= list_args(lists) | pooled_args(pooled) | _tile_args(q, out, made, wide, config, use_tma)
    with torch.cuda.device_of(q):
        launch(quantized_fwd_kernel, (-(-sq // config.block_m), heads, batch))(
            **args,
            sq=sq,
            sk=sk,
            DIM=dim,
            WIDTH=width,
            BLOCK_Q=lists.block_q,
            BLOCK_K=lists.block_k,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_P=pooled_tile(config),
            PV="half" if half else made.precision.pv,
            TMA=use_tma,
            TWO_LEVEL=two_level,
            EVEN_K=sk % lists.block_k == 0,
            HAS_PARTIAL=lists.partial is not None,
            HAS_VALID=key_valid is not None,
            HAS_ORDER=order is not None,
            HAS_POOLED=pooled is not None,
            HAS_MEAN=made.k_mean is not None,
            HAS_LSE=return_lse,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out, lse


def _descriptors(made: QuantizedQKV, wide: list[Tensor]) -> list[Tensor]:
    """What is not ours to allocate, so that a descriptor may not fit it; and one tensor of ours for the architecture."""
    return [made.v if made.precision.pv == "bf16" else made.k, *wide]


def _tile_args(
    q: Tensor, out: Tensor, made: QuantizedQKV, wide: list[Tensor], config: TileConfig, use_tma: bool
) -> dict[str, Any]:
    """Keys, values and pooled ones as tensors or descriptors, and all strides."""
    width, half = made.k.shape[3], made.precision.pv == "bf16"
    keys, pooled_keys = config.block_n, pooled_tile(config)
    tiles: dict[str, tuple[Tensor, int, int]] = {"k": (made.k, keys, width)}
    tiles["v"] = (made.v, keys, width) if half else (made.v, width, keys)
    tiles |= {name: (x, pooled_keys, width) for name, x in zip(("pool_k", "pool_v"), wide)}
    args: dict[str, Any] = {"pool_k": None, "pool_v": None}
    args |= {name: describe(*tile) if use_tma else tile[0] for name, tile in tiles.items()}
    steps: dict[str, Tensor | None] = {"q": q, "out": out, "v": made.v, "pool_k": None, "pool_v": None}
    steps |= dict(zip(("pool_k", "pool_v"), wide))
    for name, x in steps.items():
        args |= {f"{name}_{axis}": n for axis, n in zip("bhs", (0, 0, 0) if x is None else x.stride())}
    return args
