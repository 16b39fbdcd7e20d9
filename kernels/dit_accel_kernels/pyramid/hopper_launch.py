"""From tensors to a launch of the Hopper kernel with gathered keys, and what it cannot serve. Imports triton when used."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._launch import launch
from ..block_sparse.arguments import gathered_args, list_args, pooled_args
from ..block_sparse.hopper_call import hopper_call, in_units
from ..block_sparse.hopper_launch import reroute_reason
from ..block_sparse.hopper_specs import HopperConfig, hopper_config
from ..types import BlockLists, GatheredKeys, Pooled, TokenOrder, TokenWindows

__all__ = ["gathered_hopper", "run_gathered", "why_not_gathered"]

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

    config = hopper_config(q.shape[3]) if config is None else config
    if config.stages < 2:
        raise ValueError(f"config.stages must be at least 2 with gathered keys, got {config.stages}")
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
    )
    args = call.args | list_args(lists) | pooled_args(pooled) | gathered_args(gathered)
    args["more_biased"] = (gathered.bias != 0).any()
    args |= in_units("more_k", gathered.k) | in_units("more_v", gathered.v)
    args["more_s"] = args.pop("more_k_s")
    del args["more_v_s"]  # the same
    with torch.cuda.device(q.device):
        _sort(_lengths(lists, gathered), args, call.span)
        launch(gathered_hopper_kernel, (call.programs,))(
            **args,
            **call.constants,
            HAS_PARTIAL=lists.partial is not None,
            GROUP=gathered.group,
        )
    return call.out, call.lse


def _lengths(lists: BlockLists, gathered: GatheredKeys) -> Tensor:
    """What each row's keys take in key blocks, int32 ``[B|1, H|1, Qb]``."""
    more = (gathered.count * gathered.group + (lists.block_k - 1)) // lists.block_k
    found = lists.full + more
    return (found if lists.partial is None else found + lists.partial).contiguous()


def _sort(length: Tensor, args: dict[str, Any], span: int) -> None:
    """Zero the counter of jobs, and order them by length; see :mod:`..block_sparse.hopper_schedule`."""
    from ..block_sparse.hopper_schedule import BLOCK, OTHERS, longest_first_kernel

    steps = [step if size > 1 else 0 for size, step in zip(length.shape[:2], length.stride())]
    launch(longest_first_kernel, (max(1, -(-(args["jobs"] - args["in_order"]) // BLOCK)),))(
        length,
        None,
        *(args[name] for name in ("order", "counter", "in_order", "jobs", "qb", "heads")),
        *steps,
        HAS_PARTIAL=False,
        BLOCK=BLOCK,
        OTHERS=OTHERS,
        span=span,
    )
