"""What every launch of the Hopper kernels has: outputs, jobs, descriptors and the arguments that follow from the call."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..types import Pooled, TokenOrder
from .hopper_specs import HopperConfig, padded

__all__ = ["QUERIES", "HopperCall", "Jobs", "hopper_call", "in_units", "jobs_of", "make_descriptor", "multiprocessors"]

QUERIES = 128  # rows of a job, both consumers together
_TILE = 128  # keys of a step
_LOG2E = 1.0 / math.log(2.0)


class Jobs(NamedTuple):
    """The query blocks of all heads of a call, and what decides about their order besides the lists.

    Attributes:
        total: jobs of the call.
        first: those that come in turn, before what is sorted.
        span: jobs of a group.
        blocks: query blocks of a head.
        heads: heads of the call.
    """

    total: int
    first: int
    span: int
    blocks: int
    heads: int


class HopperCall(NamedTuple):
    """A launch before its lists.

    Attributes:
        out: the output, with the strides and dtype of the queries; not written yet.
        lse: float32 ``[B, H, Sq]``, or empty.
        args: run-time arguments of the kernel.
        constants: its compile-time arguments.
        programs: programs of the launch.
        span: jobs whose order is free, see :mod:`.hopper_schedule`.
        jobs: all that is known about the order.
    """

    out: Tensor
    lse: Tensor
    args: dict[str, Any]
    constants: dict[str, Any]
    programs: int
    span: int
    jobs: Jobs


def hopper_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_k: int,
    scale: float,
    order: TokenOrder | None,
    pooled: Pooled | None,
    key_valid: Tensor | None,
    return_lse: bool,
    config: HopperConfig,
    sorts: bool = True,
) -> HopperCall:
    """Allocate what a launch writes, and find the arguments that do not depend on its lists.

    Args:
        q: ``[B, H, Sq, D]``, natural order.
        k: ``[B, H, Sk, D]``, block order.
        v: like ``k``.
        block_k: tokens in a key block.
        scale: positive factor of the logits.
        order: order of the queries.
        pooled: what stands for the blocks that are not visited.
        key_valid: bool ``[B, Sk]``, false for padding.
        return_lse: whether the log-sum-exp is wanted.
        config: shape of a program.
        sorts: whether there is room for the order of jobs, which a kernel before finds; otherwise ``order`` is missing.
    """
    batch, heads, sq, dim = q.shape
    sk = k.shape[2]
    qb, kb = -(-sq // QUERIES), -(-sk // block_k)
    d, gather = padded(dim), order is not None
    out = torch.empty_like(q)
    lse = torch.empty((batch, heads, sq) if return_lse else (0,), dtype=torch.float32, device=q.device)
    all_jobs = jobs_of(q, config)
    jobs, in_order, programs = all_jobs.total, all_jobs.first, _programs(q, config)
    # The counter of jobs and a sign behind it, the order in which they are done, and the chain of those that are repeated;
    # all aligned alike whatever their number, lest another kernel be compiled.
    space = [4, -(-(jobs - in_order) // 4) * 4 if sorts else 0, jobs]
    counter, order_of_last, again = torch.empty(sum(space), dtype=torch.int32, device=q.device).split(space)
    part = (_TILE, d) if block_k == _TILE else (64, 64)
    args: dict[str, Any] = {
        "desc_q": None if gather else make_descriptor(q, 64, d),
        "desc_k": make_descriptor(k, *part),
        "desc_v": make_descriptor(v, *part),
        "desc_o": None if gather else make_descriptor(out, 64, d),
        "desc_pk": None if pooled is None else make_descriptor(pooled.k, _TILE, d),
        "desc_pv": None if pooled is None else make_descriptor(pooled.v, _TILE, d),
        "q": q if gather else None,
        "out": out if gather else None,
        "lse": lse if return_lse else None,
        "order": order_of_last if sorts else None,
        "again": again,
        "counter": counter,
        "table": None if order is None else order.table.contiguous(),
        "head_row": None if order is None else order.head.contiguous(),
        "valid": None if key_valid is None else key_valid.contiguous(),
        "scale2": scale * _LOG2E,
        "inv_scale": 1.0 / scale,
        "sk": sk,
        "words": -(-kb // 32),
        "qb": qb,
        "kb": kb,
        "heads": heads,
        "jobs": jobs,
        "in_order": in_order,
        "programs": programs,
        "table_s": sq,
        **in_units("q", q),
        **in_units("out", out),
    }
    constants = {
        "D": d,
        "DIM": dim,
        "BLOCK_K": block_k,
        "STAGES": config.stages,
        "EVEN_K": sk % block_k == 0,
        "HAS_POOLED": pooled is not None,
        "HAS_VALID": key_valid is not None,
        "GATHER": gather,
        "HAS_LSE": return_lse,
        "FAST": config.fast and q.dtype == torch.bfloat16,
        "LATE_BIAS": config.late_bias,
        "CONSUMER_REGS": config.consumer_regs,
        "PRODUCER_REGS": config.producer_regs,
        "num_warps": 4,
    }
    return HopperCall(out, lse, args, constants, programs, all_jobs.span, all_jobs)


def _programs(q: Tensor, config: HopperConfig) -> int:
    jobs = q.shape[0] * q.shape[1] * -(-q.shape[2] // QUERIES)
    return min(jobs, multiprocessors(q.device), config.max_programs or jobs)


def jobs_of(q: Tensor, config: HopperConfig) -> Jobs:
    """The jobs of a call.

    Args:
        q: ``[B, H, Sq, D]``.
        config: shape of a program.
    """
    batch, heads, sq, _ = q.shape
    blocks, programs = -(-sq // QUERIES), _programs(q, config)
    jobs = batch * heads * blocks
    # The first jobs of all programs come in order: they need not wait for the kernel that sorts.
    first = programs if config.sorted_rounds else jobs
    return Jobs(jobs, first, max(1, round(config.sorted_rounds * programs / blocks)) * blocks, blocks, heads)


def in_units(name: str, x: Tensor) -> dict[str, int]:
    """Strides of ``[B, H, S, D]`` in units of 16 bytes; that of a dimension of size 1 need not be a multiple."""
    return {f"{name}_{axis}": step // 8 for axis, step in zip("bhs", x.stride())}


def make_descriptor(x: Tensor, rows: int, columns: int) -> Any:
    """A TMA descriptor of boxes of ``rows`` tokens; what is beyond the tensor reads as 0 and is never written."""
    descriptor, layout = _tma()
    # The stride of a dimension of size 1 is never used but must look valid.
    shape, steps = x.shape, x.stride()
    strides = [step if size > 1 else shape[3] for size, step in zip(shape[:3], steps)]
    return descriptor(x, list(shape), [*strides, 1], [1, 1, rows, columns], layout)


@lru_cache(maxsize=1)
def _tma() -> tuple[Any, Any]:
    """The class of descriptors and the shared-memory layout of all tiles; short calls would notice making it each time."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor, NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
