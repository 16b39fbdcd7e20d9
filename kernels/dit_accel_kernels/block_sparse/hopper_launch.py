"""From tensors to a launch of the Hopper kernel, and what it cannot serve. Imports triton only when it is used."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .._launch import launch
from ..types import BlockLists, GatheredKeys, Pooled, TokenOrder, TokenWindows
from .arguments import list_args, pooled_args
from .hopper_call import QUERIES, hopper_call
from .hopper_kept import order_of_jobs
from .hopper_short_launch import launch_short
from .hopper_short_specs import is_short
from .hopper_specs import PTX_OPTIONS, HopperConfig, hopper_config, spares_registers
from .near import packed_windows

__all__ = [
    "block_sparse_hopper",
    "has_gluon",
    "reroute_reason",
    "run_hopper",
    "why_not_hopper",
]


def why_not_hopper(
    *, device: torch.device, dtype: torch.dtype, head_dim: int, block_q: int, block_k: int
) -> str | None:
    """Say why the Hopper kernel cannot serve, or return ``None``; what depends on a call is rerouted instead.

    Args:
        device: where the tensors are.
        dtype: of queries, keys and values.
        head_dim: columns of a head.
        block_q: tokens in a query block.
        block_k: tokens in a key block.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return f"device must be an NVIDIA GPU, got {device}"
    capability = _capability(device)
    if capability != (9, 0):
        return f"compute capability must be 9.0, got {capability[0]}.{capability[1]}"
    if not has_gluon():
        return "triton must have Gluon with warp specialisation (3.6 or newer)"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"dtype must be bfloat16 or float16, got {dtype}"
    if head_dim % 8 or not 8 <= head_dim <= 128:
        return f"head_dim must be a multiple of 8 of at most 128, got {head_dim}"
    if block_q != QUERIES:
        return f"block_q must be {QUERIES}, got {block_q}"
    if block_k not in (64, 128):
        return f"block_k must be 64 or 128, got {block_k}"
    return None


def reroute_reason(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    *,
    pooled: Pooled | None = None,
    windows: TokenWindows | None = None,
    gathered: GatheredKeys | None = None,
) -> str | None:
    """Say why the Triton kernel must compute this call although the Hopper kernel serves its dtype and block sizes.

    Args:
        q: ``[B, H, Sq, D]``.
        k: ``[B, H, Sk, D]``.
        v: ``[B, H, Sk, D]``.
        lists: blocks that each query block visits.
        pooled: what stands for the blocks that are not visited.
        windows: token windows of partial blocks.
        gathered: further keys in groups.
    """
    if windows is not None and pooled is not None:
        return "token windows together with a pooled remainder are not supported"
    if windows is not None and packed_windows(windows, lists.block_k) is None:
        return "the codes of token windows must be within 1023 of each other, and within ten in a block of keys"
    if gathered is not None:
        return "gathered keys are not supported"
    tensors = {"q": q, "k": k, "v": v}
    if pooled is not None:
        tensors |= {"pooled.k": pooled.k, "pooled.v": pooled.v}
        if max(pooled.bits.numel(), pooled.bias.numel()) >= 2**31:
            return "pooled.bits and pooled.bias must have fewer than 2**31 elements"
    for name, x in tensors.items():
        if x.data_ptr() % 16 or not _steps_fit(x.shape, x.stride(), x.element_size()):
            return f"{name} must have an address and strides that are multiples of 16 bytes, got {x.stride()}"
    if lists.row_start.numel() >= 2**31:
        return "lists must have fewer than 2**31 rows"
    return None


@lru_cache(maxsize=64)
def _steps_fit(shape: torch.Size, strides: tuple[int, ...], size: int) -> bool:
    """Whether the copy engine can step over the first three dimensions."""
    steps = [step * size for count, step in zip(shape[:3], strides[:3]) if count > 1]
    return all(step % 16 == 0 and 0 < step < 2**40 for step in steps)


def run_hopper(q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Compute with the Hopper kernel, or with the Triton kernel where :func:`reroute_reason` has a reason.

    Arguments and results as of :attr:`dit_accel_kernels.backends.Backend.run`.
    """
    extras = {name: kwargs.get(name) for name in ("pooled", "windows", "gathered")}
    if reroute_reason(q, k, v, lists, **extras) is not None:
        from .launch import block_sparse_triton

        return block_sparse_triton(q, k, v, lists, **kwargs)
    kept = {name: value for name, value in kwargs.items() if name != "gathered"}
    return block_sparse_hopper(q, k, v, lists, **kept)


def block_sparse_hopper(
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
    return_lse: bool = True,
    config: HopperConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute what :func:`~.reference.block_sparse_reference` means on a Hopper GPU.

    Args:
        q: ``[B, H, Sq, D]``, natural order.
        k: ``[B, H, Sk, D]``, block order.
        v: ``[B, H, Sk, D]``, block order.
        lists: blocks that each query block visits.
        scale: positive factor of the logits.
        order: order of the queries.
        pooled: what stands for the blocks that are not visited; must be finite.
        windows: token windows of partial blocks, not together with ``pooled``; without them partial blocks are whole.
        key_valid: bool ``[B, Sk]``, false for padding, which must be finite.
        return_lse: compute the log-sum-exp; otherwise an empty tensor stands for it.
        config: shape of a program, to tune or test.

    Returns:
        The output with the strides and dtype of ``q``, and the log-sum-exp, float32 ``[B, H, Sq]``.

    Raises:
        ValueError: the windows cannot be had here; see :func:`reroute_reason`.
    """
    from .hopper import block_sparse_hopper_kernel

    config = hopper_config(q.shape[3]) if config is None else config
    call = hopper_call(
        q,
        k,
        v,
        block_k=lists.block_k,
        scale=scale,
        order=order,
        pooled=pooled,
        key_valid=key_valid,
        return_lse=return_lse,
        config=config,
        sorts=False,
    )
    args = call.args | list_args(lists) | pooled_args(pooled) | _window_args(windows, pooled, lists)
    has_partial = lists.partial is not None
    plain = order is None and pooled is None and windows is None and key_valid is None
    with torch.cuda.device(q.device):
        args["order"], known = order_of_jobs(lists, call.jobs, args["counter"])
        args["alone"] = int(known)
        if plain and call.constants["FAST"] and is_short(lists, config):
            launch_short(call, args, has_partial, assembler_options())
            return call.out, call.lse
        launch(block_sparse_hopper_kernel, (call.programs,))(
            **args,
            **call.constants,
            HAS_PARTIAL=has_partial,
            HAS_WINDOWS=windows is not None,
            FETCH=config.fetch,
            RELEASE=0 if config.early_release else 1,
            launch_pdl=True,
            **(assembler_options() if spares_registers(q.shape[3]) else {}),
        )
    return call.out, call.lse


def _window_args(windows: TokenWindows | None, pooled: Pooled | None, lists: BlockLists) -> dict[str, Tensor | None]:
    if windows is None:
        return dict.fromkeys(("q_lo", "q_hi", "k_bits", "k_base"))
    packed = packed_windows(windows, lists.block_k)
    if packed is None or pooled is not None or lists.partial is None:
        raise ValueError("windows must have partial blocks, codes that are near each other, and no pooled remainder")
    return dict(vars(packed))


@lru_cache(maxsize=16)
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@lru_cache(maxsize=1)
def assembler_options() -> dict[str, str]:
    """What the kernel's launch says to ptxas, where this Triton passes it on."""
    from triton.backends.nvidia.compiler import CUDAOptions

    return {"ptx_options": PTX_OPTIONS} if "ptx_options" in CUDAOptions.__dataclass_fields__ else {}


@lru_cache(maxsize=1)
def has_gluon() -> bool:
    """Whether triton has Gluon with warp specialisation."""
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    major, minor = (int(part) for part in triton.__version__.split(".")[:2])
    return (major, minor) >= (3, 6) and importlib.util.find_spec("triton.experimental.gluon") is not None
