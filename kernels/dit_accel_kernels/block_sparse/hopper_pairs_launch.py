"""From tensors to a launch of the Hopper kernel for pairs of query blocks. Imports triton only when it is used."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._launch import launch
from ..types import BlockLists, GatheredKeys, Pooled, TokenOrder, TokenWindows
from .arguments import pooled_args
from .hopper_call import hopper_call, make_descriptor
from .hopper_launch import assembler_options, reroute_reason, why_not_hopper
from .hopper_pairs_specs import PairsConfig, pairs_config
from .hopper_specs import HopperConfig, padded

__all__ = ["PairLists", "block_sparse_pairs", "pair_lists", "run_pairs", "why_not_pairs"]

_BLOCK = 64
# Places of a job's tiles are told in 16 bits.
_MOST_KEYS = 64 * 32767


class PairLists(NamedTuple):
    """What :func:`~.hopper_pairs_lists.pair_lists_kernel` makes of lists.

    Attributes:
        merged: int16 ``[capacity * block_k / 64]``, blocks of each pair in the order of its tiles.
        told: int32 ``[B|1, H|1, pairs, 8]``, where the rows of each pair are.
        length: int32 ``[B|1, H|1, pairs]``, blocks of 64 keys of the longer row.
    """

    merged: Tensor
    told: Tensor
    length: Tensor


def why_not_pairs(*, block_q: int, **where: Any) -> str | None:
    """Like :func:`~.hopper_launch.why_not_hopper`, for query blocks of 64."""
    reason = why_not_hopper(block_q=128, **where)
    if reason is None and block_q != _BLOCK:
        return f"block_q must be 64 or 128, got {block_q}"
    return reason


def why_not_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    *,
    pooled: Pooled | None = None,
    windows: TokenWindows | None = None,
    gathered: GatheredKeys | None = None,
) -> str | None:
    """Say why the Triton kernel must compute this call; arguments as of :func:`~.hopper_launch.reroute_reason`."""
    if windows is not None:
        return "token windows with query blocks of 64 are not supported"
    if k.shape[2] > _MOST_KEYS:
        return f"there must be at most {_MOST_KEYS} keys, got {k.shape[2]}"
    if lists.indices.numel() * (lists.block_k // _BLOCK) >= 2**31 or lists.row_start.numel() * 4 >= 2**31:
        return "lists must have fewer than 2**31 entries in units of 64 keys"
    return reroute_reason(q, k, v, lists, pooled=pooled, gathered=gathered)


def run_pairs(q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Compute with the Hopper kernel, or with the Triton kernel where :func:`why_not_call` has a reason.

    Arguments and results as of :attr:`dit_accel_kernels.backends.Backend.run`.
    """
    extras = {name: kwargs.get(name) for name in ("pooled", "windows", "gathered")}
    if why_not_call(q, k, v, lists, **extras) is not None:
        from .launch import block_sparse_triton

        return block_sparse_triton(q, k, v, lists, **kwargs)
    kept = {name: value for name, value in kwargs.items() if name not in ("gathered", "windows")}
    return block_sparse_pairs(q, k, v, lists, **kept)


def pair_lists(lists: BlockLists, sk: int, *, tile: int) -> PairLists:
    """Sort the entries of neighbouring rows by whether both have them; two kernels see the result only on the GPU.

    Args:
        lists: lists with query blocks of 64, rows apart from each other in ``indices``.
        sk: number of keys.
        tile: keys of a tile, 64 or 128.
    """
    from .hopper_pairs_lists import CHUNK, FIELDS, pair_lists_kernel

    ratio, kb = lists.block_k // _BLOCK, -(-sk // _BLOCK)
    batch, heads, qb = lists.row_start.shape
    pairs, device = (qb + 1) // 2, lists.indices.device
    merged = torch.empty(lists.indices.numel() * ratio, dtype=torch.int16, device=device)
    told = torch.empty((batch, heads, pairs, FIELDS), dtype=torch.int32, device=device)
    length = torch.empty((batch, heads, pairs), dtype=torch.int32, device=device)
    launch(pair_lists_kernel, (batch * heads * pairs,))(
        lists.row_start.contiguous(),
        lists.full.contiguous(),
        None if lists.partial is None else lists.partial.contiguous(),
        lists.indices.contiguous(),
        merged,
        told,
        length,
        qb,
        pairs,
        -(-sk // lists.block_k) - 1 if sk % lists.block_k else -1,
        kb,
        R=ratio,
        PARTS=tile // _BLOCK,
        HAS_PARTIAL=lists.partial is not None,
        CHUNK=CHUNK,
        FIELDS=FIELDS,
        PDL=device.type == "cuda",
        num_warps=1,
    )
    return PairLists(merged, told, length)


def block_sparse_pairs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    *,
    scale: float,
    order: TokenOrder | None = None,
    pooled: Pooled | None = None,
    key_valid: Tensor | None = None,
    return_lse: bool = True,
    config: PairsConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute what :func:`~.reference.block_sparse_reference` means on a Hopper GPU, with query blocks of 64.

    Args:
        q: ``[B, H, Sq, D]``, natural order.
        k: ``[B, H, Sk, D]``, block order.
        v: ``[B, H, Sk, D]``, block order.
        lists: blocks that each query block visits; partial blocks are whole. Rows must be apart in ``indices``.
        scale: positive factor of the logits.
        order: order of the queries.
        pooled: what stands for the blocks that are not visited; must be finite.
        key_valid: bool ``[B, Sk]``, false for padding, which must be finite.
        return_lse: compute the log-sum-exp; otherwise an empty tensor stands for it.
        config: shape of a program, to tune or test.

    Returns:
        The output with the strides and dtype of ``q``, and the log-sum-exp, float32 ``[B, H, Sq]``.
    """
    from .hopper_pairs import block_sparse_pairs_kernel

    config = pairs_config(q.shape[3]) if config is None else config
    call = hopper_call(
        q,
        k,
        v,
        block_k=_BLOCK,
        scale=scale,
        order=order,
        pooled=pooled,
        key_valid=key_valid,
        return_lse=return_lse,
        config=_common(config),
    )
    with torch.cuda.device(q.device):
        pairs = pair_lists(lists, k.shape[2], tile=config.tile)
        args = call.args | pooled_args(pooled) | _own_args(q, k, v, lists, pairs, pooled, config)
        args["in_order"] = 0
        args["order"] = torch.empty(args["jobs"], dtype=torch.int32, device=q.device)
        _sort(pairs.length, args, call.span)
        launch(block_sparse_pairs_kernel, (call.programs,))(
            **args,
            **{name: x for name, x in call.constants.items() if name not in ("BLOCK_K", "LATE_BIAS")},
            TILE=config.tile,
            FETCH=config.fetch,
            launch_pdl=True,
            **(assembler_options() if config.spare else {}),
        )
    return call.out, call.lse


def _common(config: PairsConfig) -> HopperConfig:
    """What both Hopper kernels are told in the same way."""
    names = ("stages", "fast", "sorted_rounds", "fetch", "max_programs", "consumer_regs", "producer_regs")
    return HopperConfig(**{name: getattr(config, name) for name in names})


def _own_args(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, pairs: PairLists, pooled: Pooled | None, config: PairsConfig
) -> dict[str, Any]:
    """Arguments that differ from those of the other kernel."""
    d = padded(q.shape[3])
    part = (64, d) if config.tile == 64 else (64, 64)
    steps = [step // 8 if size > 1 else 0 for size, step in zip(pairs.told.shape[:2], pairs.told.stride())]
    pooled_keys = -(-k.shape[2] // lists.block_k)
    args: dict[str, Any] = {
        "desc_k": make_descriptor(k, *part),
        "desc_v": make_descriptor(v, *part),
        "merged": pairs.merged,
        "told": pairs.told,
        "rows": lists.row_start.shape[2],
        "pooled_keys": pooled_keys,
        "words": -(-pooled_keys // 32),
        "list_b": steps[0],
        "list_h": steps[1],
    }
    if pooled is not None:
        args["desc_pk"] = make_descriptor(pooled.k, config.tile, d)
        args["desc_pv"] = make_descriptor(pooled.v, config.tile, d)
    return args


def _sort(length: Tensor, args: dict[str, Any], span: int) -> None:
    """Zero the counter of jobs, and order them by length; see :mod:`.hopper_schedule`."""
    from .hopper_schedule import BLOCK, OTHERS, longest_first_kernel

    launch(longest_first_kernel, (max(1, -(-args["jobs"] // BLOCK)),))(
        length,
        None,
        *(args[name] for name in ("order", "counter", "in_order", "jobs", "qb", "heads")),
        args["list_b"],
        args["list_h"],
        HAS_PARTIAL=False,
        BLOCK=BLOCK,
        OTHERS=OTHERS,
        span=span,
        PDL=True,
        launch_pdl=True,
    )
