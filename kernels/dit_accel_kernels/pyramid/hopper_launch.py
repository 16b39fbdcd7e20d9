"""From tensors to a launch of the Hopper kernel with gathered keys, and what it cannot serve. Imports triton when used."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..block_sparse.arguments import gathered_args, list_args, pooled_args
from ..block_sparse.hopper_launch import make_descriptor, multiprocessors, reroute_reason
from ..block_sparse.hopper_specs import HopperConfig, hopper_config, padded
from ..types import BlockLists, GatheredKeys, Pooled, TokenOrder, TokenWindows

__all__ = ["gathered_hopper", "run_gathered", "why_not_gathered"]

_QUERIES = 128  # rows of a job, both consumers together
_TILE = 128  # keys of a step
_LOG2E = 1.0 / math.log(2.0)
_GROUPS = (1, 8, 16)  # what has run on a GPU, and all that the methods use with blocks of 64 and 128


def why_not_gathered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    gathered: GatheredKeys,
    *,
    pooled: Pooled | None = None,
    windows: TokenWindows | None = None,
    key_valid: Tensor | None = None,
) -> str | None:
    """Say why the Triton kernel must compute this call although the Hopper kernel serves its dtype and block sizes.

    Args:
        q: ``[B, H, Sq, D]``.
        k: ``[B, H, Sk, D]``.
        v: ``[B, H, Sk, D]``.
        lists: blocks that each query block visits.
        gathered: further keys in groups.
        pooled: what stands for the blocks that are not visited.
        windows: token windows of partial blocks.
        key_valid: bool ``[B, Sk]``, false for padding.
    """
    if gathered.group not in _GROUPS:
        return f"gathered.group must be one of {_GROUPS}, got {gathered.group}"
    if key_valid is not None:
        return "key_valid together with gathered keys has not run on a GPU yet"
    for name, x in (("k", gathered.k), ("v", gathered.v)):
        steps = [step * x.element_size() for size, step in zip(x.shape[:3], x.stride()[:3]) if size > 1]
        if x.data_ptr() % 16 or any(step % 16 for step in steps):
            return f"gathered.{name} must have an address and strides that are multiples of 16 bytes, got {x.stride()}"
    steps = [x.stride(2) for x in (gathered.k, gathered.v)]
    if steps[0] != steps[1] or not 0 < steps[0] * gathered.k.shape[2] < 2**34:
        return f"gathered.k and gathered.v must have one token stride, all tokens within 2**34 elements, got {steps}"
    if gathered.bias.numel() >= 2**31 or gathered.row_start.numel() >= 2**31:
        return "gathered.bias and gathered.row_start must have fewer than 2**31 elements"
    if windows is not None:
        return "token windows are not supported together with gathered keys"
    return reroute_reason(q, k, v, lists, pooled=pooled)


def run_gathered(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, *, gathered: GatheredKeys, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Compute with the Hopper kernel, or with the Triton kernel where :func:`why_not_gathered` has a reason.

    Arguments and results as of :attr:`dit_accel_kernels.backends.Backend.run`.
    """
    extras = {name: kwargs.get(name) for name in ("pooled", "windows", "key_valid")}
    if why_not_gathered(q, k, v, lists, gathered, **extras) is not None:
        from ..block_sparse.launch import block_sparse_triton

        return block_sparse_triton(q, k, v, lists, gathered=gathered, **kwargs)
    kept = {name: value for name, value in kwargs.items() if name != "windows"}
    return gathered_hopper(q, k, v, lists, gathered, **kept)


def gathered_hopper(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    gathered: GatheredKeys,
    *,
    scale: float,
    order: TokenOrder | None = None,
    pooled: Pooled | None = None,
    key_valid: Tensor | None = None,
    return_lse: bool = True,
    config: HopperConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute what :func:`~..block_sparse.reference.block_sparse_reference` means on a Hopper GPU, with gathered keys.

    Args:
        q: ``[B, H, Sq, D]``, natural order.
        k: ``[B, H, Sk, D]``, block order.
        v: ``[B, H, Sk, D]``, block order.
        lists: blocks that each query block visits; partial blocks are whole.
        gathered: further keys, of which each query block sees some groups; keys with a bias of ``-inf`` may hold NaN.
        scale: positive factor of the logits.
        order: order of the queries.
        pooled: what stands for the blocks that are not visited; must be finite.
        key_valid: bool ``[B, Sk]``, false for padding, which must be finite; gathered keys say so by their bias.
        return_lse: compute the log-sum-exp; otherwise an empty tensor stands for it.
        config: shape of a program, to tune or test; at least two stages.

    Returns:
        The output with the strides and dtype of ``q``, and the log-sum-exp, float32 ``[B, H, Sq]``.

    Raises:
        ValueError: ``config`` has fewer than two stages.
    """
    from .hopper import gathered_hopper_kernel

    batch, heads, sq, dim = q.shape
    sk, block_k = k.shape[2], lists.block_k
    qb, kb = -(-sq // _QUERIES), -(-sk // block_k)
    config = hopper_config(dim) if config is None else config
    if config.stages < 2:
        raise ValueError(f"config.stages must be at least 2 with gathered keys, got {config.stages}")
    d = padded(dim)
    out = torch.empty_like(q)
    lse = torch.empty((batch, heads, sq) if return_lse else (0,), dtype=torch.float32, device=q.device)
    jobs = batch * heads * qb
    programs = min(jobs, multiprocessors(q.device), config.max_programs or jobs)
    in_order = 0 if config.sorted_rounds else jobs
    # Aligned alike whatever their number, lest another kernel be compiled.
    space = [4, -(-(jobs - in_order) // 4) * 4, jobs]
    counter, order_of_last, again = torch.empty(sum(space), dtype=torch.int32, device=q.device).split(space)
    gather = order is not None
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
        "order": order_of_last,
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
    }
    args |= list_args(lists) | pooled_args(pooled) | gathered_args(gathered)
    args["more_biased"] = (gathered.bias != 0).any()
    # In units of 16 bytes; that of a dimension of size 1 need not be a multiple and is never stepped over.
    for name, x in (("q", q), ("out", out), ("more_k", gathered.k), ("more_v", gathered.v)):
        args |= {f"{name}_{axis}": step // 8 for axis, step in zip("bhs", x.stride())}
    args["more_s"] = args.pop("more_k_s")
    del args["more_v_s"]  # the same
    with torch.cuda.device(q.device):
        span = max(1, round(config.sorted_rounds * programs / qb)) * qb
        _sort(_lengths(lists, gathered), order_of_last, counter, in_order, jobs, qb, heads, span)
        gathered_hopper_kernel[(programs,)](
            **args,
            D=d,
            DIM=dim,
            BLOCK_K=block_k,
            STAGES=config.stages,
            EVEN_K=sk % block_k == 0,
            HAS_PARTIAL=lists.partial is not None,
            HAS_POOLED=pooled is not None,
            HAS_VALID=key_valid is not None,
            GATHER=gather,
            HAS_LSE=return_lse,
            FAST=config.fast and q.dtype == torch.bfloat16,
            GROUP=gathered.group,
            LATE_BIAS=config.late_bias,
            CONSUMER_REGS=config.consumer_regs,
            PRODUCER_REGS=config.producer_regs,
            num_warps=4,
        )
    return out, lse


def _lengths(lists: BlockLists, gathered: GatheredKeys) -> Tensor:
    """What each row's keys take in key blocks, int32 ``[B|1, H|1, Qb]``."""
    more = (gathered.count * gathered.group + (lists.block_k - 1)) // lists.block_k
    found = lists.full + more
    return (found if lists.partial is None else found + lists.partial).contiguous()


def _sort(
    length: Tensor, order: Tensor, counter: Tensor, in_order: int, jobs: int, qb: int, heads: int, span: int
) -> None:
    """Zero the counter of jobs, and find those behind ``in_order`` by length; see :mod:`..block_sparse.hopper_schedule`."""
    from ..block_sparse.hopper_schedule import BLOCK, OTHERS, longest_first_kernel

    steps = [step if size > 1 else 0 for size, step in zip(length.shape[:2], length.stride())]
    longest_first_kernel[(max(1, -(-(jobs - in_order) // BLOCK)),)](
        length, None, order, counter, in_order, jobs, qb, heads, *steps,
        HAS_PARTIAL=False, BLOCK=BLOCK, OTHERS=OTHERS, span=span,
    )  # fmt: skip
