"""From quantised tensors to a launch of the 8-bit Hopper kernel, and what it cannot serve.

Imports triton only when it is used.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .._launch import launch
from ..block_sparse.arguments import list_args
from ..block_sparse.hopper_call import multiprocessors
from ..block_sparse.hopper_launch import why_not_hopper
from ..quantize import Precision, QuantizedQKV
from ..types import BlockLists, Pooled, TokenOrder
from .hopper8_specs import Hopper8Config, hopper8_config

# Kinds of values with which this code has passed tests/kernels/test_hopper8.py on a GPU, without and with a remainder;
# others only run when called directly.
_RUN_ON_A_GPU = ("bf16", "fp8")
_RUN_WITH_A_REMAINDER = ("bf16", "fp8")
_QUERIES = 128  # rows of a job, both consumers together
_LIMIT = 2.0**60  # of the sum of some bfloat16 weights: a larger one needs a new base
_E4M3_LIMIT = 440.0  # of the sum of 32 e4m3 weights, 256 for 32 of a fresh base: a saturated one, 448, is above it
_LOG2E = 1.0 / math.log(2.0)

__all__ = ["quantized_hopper", "reroute_reason", "run_hopper8", "why_not_hopper8"]


def why_not_hopper8(
    *, device: torch.device, dtype: torch.dtype, head_dim: int, block_q: int, block_k: int, precision: Precision
) -> str | None:
    """Say why the 8-bit Hopper kernel cannot serve, or return ``None``; what depends on a call is rerouted instead.

    Args:
        device: where the tensors are.
        dtype: of queries, keys and values as they are given.
        head_dim: columns of a head.
        block_q: tokens in a query block.
        block_k: tokens in a key block.
        precision: the number formats.
    """
    reason = why_not_hopper(device=device, dtype=dtype, head_dim=head_dim, block_q=block_q, block_k=block_k)
    if reason is not None:
        return reason
    if precision.pv == "int8":
        return "INT8 weights are not built for Hopper"
    if precision.pv not in _RUN_ON_A_GPU:
        return "with e4m3 values the kernel has not run on a GPU in its present form, see docs/hopper8_notes.md"
    if precision.pv == "bf16" and dtype != torch.bfloat16:
        return f"16-bit values must be bfloat16, which has the range that the weights need, got {dtype}"
    return None


def reroute_reason(
    q: Tensor,
    made: QuantizedQKV,
    lists: BlockLists,
    *,
    pooled: Pooled | None = None,
    key_valid: Tensor | None = None,
) -> str | None:
    """Say why the Triton kernel must compute this call although the Hopper kernel serves its types and block sizes.

    Args:
        q: ``[B, H, Sq, D]``.
        made: the quantised tensors.
        lists: blocks that each query block visits.
        pooled: what stands for the blocks that are not visited.
        key_valid: bool ``[B, Sk]``, false for padding.
    """
    if key_valid is not None:
        return "key_valid is not supported"
    if pooled is not None and made.precision.pv not in _RUN_WITH_A_REMAINDER:
        return "with e4m3 values a pooled remainder has not run on a GPU, see docs/hopper8_notes.md"
    tensors = {"q": q}
    if pooled is not None:
        tensors |= {"pooled.k": pooled.k, "pooled.v": pooled.v}
        if max(pooled.bits.numel(), pooled.bias.numel()) >= 2**31:
            return "pooled.bits and pooled.bias must have fewer than 2**31 elements"
    if made.precision.pv == "bf16":
        tensors["v"] = made.v
    for name, x in tensors.items():
        steps = [step * x.element_size() for size, step in zip(x.shape[:3], x.stride()[:3]) if size > 1]
        if x.data_ptr() % 16 or any(step % 16 or not 0 < step < 2**40 for step in steps):
            return f"{name} must have an address and strides that are multiples of 16 bytes, got {x.stride()}"
    if lists.row_start.numel() >= 2**31 or made.q_scale.numel() >= 2**31:
        return "lists must have fewer than 2**31 rows, and queries fewer tokens than that"
    return None


def run_hopper8(q: Tensor, made: QuantizedQKV, lists: BlockLists, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Compute with the Hopper kernel, or with the Triton kernel where :func:`reroute_reason` has a reason.

    Arguments and results as of :func:`~.launch.quantized_triton`.
    """
    extras = {name: kwargs.get(name) for name in ("pooled", "key_valid")}
    if reroute_reason(q, made, lists, **extras) is not None:
        from .launch import quantized_triton

        return quantized_triton(q, made, lists, **kwargs)
    return quantized_hopper(q, made, lists, **{name: x for name, x in kwargs.items() if name != "key_valid"})


def quantized_hopper(
    q: Tensor,
    made: QuantizedQKV,
    lists: BlockLists,
    *,
    scale: float,
    order: TokenOrder | None = None,
    pooled: Pooled | None = None,
    return_lse: bool = True,
    config: Hopper8Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute what :func:`~.reference.quantized_reference` means on a Hopper GPU.

    A remainder is attended to by the 16-bit kernel, in a second call, and merged.

    Args:
        q: ``[B, H, Sq, D]`` 16-bit, natural order: for the log-sum-exp and the layout of the output.
        made: the quantised tensors; 16-bit values must be bfloat16.
        lists: blocks that each query block visits; partial blocks are whole.
        scale: positive factor of the logits.
        order: order of the queries.
        pooled: what stands for the blocks that are not visited; must be finite.
        return_lse: compute the log-sum-exp; otherwise an empty tensor stands for it.
        config: shape of a program, to tune or test.

    Returns:
        The output with the strides and dtype of ``q``, and the log-sum-exp, float32 ``[B, H, Sq]``.
    """
    made = made.unpacked()
    out, lse = _exact_blocks(q, made, lists, scale, order, return_lse or pooled is not None, config)
    if pooled is not None:
        from ..block_sparse.hopper_launch import block_sparse_hopper
        from .hopper8_merge import merge

        call: dict[str, Any] = {"scale": scale, "order": order, "pooled": pooled}
        # It visits no block: of its keys and values only the shape counts.
        codes = made.k.view(q.dtype)
        other, other_lse = block_sparse_hopper(q, codes, codes, _nothing(lists), **call)
        merge(q, made.k_mean, out, lse, other, other_lse, scale)
    elif return_lse and made.k_mean is not None:
        from .hopper8_merge import add_mean

        add_mean(q, made.k_mean, lse, scale)
    return out, lse


def _nothing(lists: BlockLists) -> BlockLists:
    """The same lists without a block."""
    return replace(lists, full=torch.zeros_like(lists.full), partial=None)


def _exact_blocks(
    q: Tensor,
    made: QuantizedQKV,
    lists: BlockLists,
    scale: float,
    order: TokenOrder | None,
    return_lse: bool,
    config: Hopper8Config | None,
) -> tuple[Tensor, Tensor]:
    """Attention to the blocks of the lists; the log-sum-exp lacks the share of the mean key."""
    from ..block_sparse.hopper_schedule import BLOCK, OTHERS, longest_first_kernel
    from .hopper8 import quantized_hopper_kernel

    batch, heads, sq, dim = q.shape
    sk, columns = made.k.shape[2:]
    block_k, fp8 = lists.block_k, made.precision.pv == "fp8"
    qb, kb = -(-sq // _QUERIES), -(-sk // block_k)
    if config is None:
        config = hopper8_config(columns, made.precision.pv)
    out = torch.empty_like(q)
    lse = torch.empty((batch, heads, sq) if return_lse else (0,), dtype=torch.float32, device=q.device)
    jobs = batch * heads * qb
    programs = min(jobs, multiprocessors(q.device), config.max_programs or jobs)
    gather = order is not None
    # The first jobs of all programs come in order: they need not wait for the kernel that sorts.
    in_order = programs if config.sorted_rounds else jobs
    span = max(1, round(config.sorted_rounds * programs / qb)) * qb
    # The counter of jobs, and the order in which they are done; aligned alike whatever their number.
    space = [4, max(4, jobs - in_order)]
    counter, order_of_last = torch.empty(sum(space), dtype=torch.int32, device=q.device).split(space)
    part = (128, columns, 128) if block_k == 128 else (64, 64, 128)
    args: dict[str, Any] = {
        "desc_q": _descriptor(made.q, 64, columns, columns),
        "desc_k": _descriptor(made.k, block_k, columns, columns),
        "desc_v": _descriptor(made.v, *((columns, 64, 64) if fp8 else part)),
        "desc_o": None if gather else _descriptor(out, 64, columns, 128),
        "out": out,
        "lse": lse if return_lse else None,
        "q_scale": made.q_scale,
        "k_scale": made.k_scale,
        "v_scale": made.v_scale,
        "order": order_of_last,
        "counter": counter,
        "table": None if order is None else order.table.contiguous(),
        "head_row": None if order is None else order.head.contiguous(),
        "scale2": scale * _LOG2E,
        "limit": _E4M3_LIMIT if fp8 else _LIMIT,
        "zero": 0,
        "sq": sq,
        "sk": sk,
        "qb": qb,
        "kb": kb,
        "heads": heads,
        "jobs": jobs,
        "in_order": in_order,
        "programs": programs,
    }
    # In units of 8 elements; that of a dimension of size 1 need not be a multiple and is never stepped over.
    args |= {f"out_{name}": step // 8 for name, step in zip("bhs", out.stride())}
    args |= list_args(lists)
    with torch.cuda.device(q.device):
        launch(longest_first_kernel, (max(1, -(-(jobs - in_order) // BLOCK)),))(
            *(args[name] for name in ("full", "partial", "order", "counter", "in_order", "jobs", "qb", "heads")),
            args["list_b"],
            args["list_h"],
            HAS_PARTIAL=lists.partial is not None,
            BLOCK=BLOCK,
            OTHERS=OTHERS,
            span=span,
            PDL=True,
            launch_pdl=True,
        )
        launch(quantized_hopper_kernel, (programs,))(
            **args,
            D=columns,
            DIM=dim,
            BLOCK_K=block_k,
            STAGES=config.stages,
            EVEN_K=sk % block_k == 0,
            HAS_PARTIAL=lists.partial is not None,
            GATHER=gather,
            HAS_LSE=return_lse,
            HEADROOM=config.headroom,
            TURNS=config.turns,
            LINES=config.lines,
            CONSUMER_REGS=config.consumer_regs,
            PRODUCER_REGS=config.producer_regs,
            num_warps=4,
            launch_pdl=True,
        )
    return out, lse


def _descriptor(x: Tensor, rows: int, columns: int, swizzle: int) -> Any:
    """A TMA descriptor of boxes of ``rows`` by ``columns``; what is beyond the tensor reads as 0 and is never written."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=8 * x.element_size(), rank=4)
    # The stride of a dimension of size 1 is never used but must look valid.
    strides = [step if size > 1 else x.shape[3] for size, step in zip(x.shape, x.stride())]
    strides[3] = 1
    return TensorDescriptor(x, list(x.shape), strides, [1, 1, rows, columns], layout)
