"""Keys and values averaged at several lengths, as one sequence to gather from (pyramid attention, arXiv 2512.04025)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._common import blocks, check_bhsd, resolve_backend
from ..lists import gathered_from_mask
from .reference import pyramid_reference

__all__ = ["Pyramid", "check_levels", "pyramid", "pyramid_groups", "pyramid_rows"]


class Pyramid(NamedTuple):
    """What :func:`pyramid` returns.

    The levels lie one after the other, in the order in which they were asked for; within a level the keys are in block
    order. Level ``L`` of block ``j`` is ``max(levels) // L`` groups from ``offsets[L] + j * (max(levels) // L)`` on.

    Attributes:
        k: ``[B, H, Se, D]`` contiguous, mean of the valid keys of each run of ``L`` tokens, of the dtype of the input and
            accumulated in float32; 0 where none is valid.
        v: like ``k``.
        bias: float32 ``[B|1, 1, Se]``, natural logarithm of the number of valid tokens of each run; ``-inf`` for none.
        offsets: first group of each level.
        group: keys in a group, ``block // max(levels)``.
    """

    k: Tensor
    v: Tensor
    bias: Tensor
    offsets: dict[int, int]
    group: int


def pyramid(
    k: Tensor,
    v: Tensor,
    *,
    levels: tuple[int, ...] = (2, 4, 8),
    block: int = 64,
    key_valid: Tensor | None = None,
    backend: str | None = None,
) -> Pyramid:
    """Average keys and values over runs of each length in ``levels``.

    Together with rows of groups (:func:`pyramid_groups`, :func:`dit_accel_kernels.gathered_from_mask`) the result is what
    :class:`dit_accel_kernels.GatheredKeys` needs, so that a block of keys enters the softmax whole, at any level, or not.
    A key that stands for ``n`` tokens has a bias of ``log n``, which gives it their softmax mass (arXiv 2512.04025).

    Args:
        k: ``[B, H, S, D]`` in block order, any strides, last dimension contiguous.
        v: like ``k``.
        levels: tokens of a run, different powers of two from 2 to ``block``.
        block: tokens in a key block, a power of two; the last one may be ragged, and is filled up with keys whose bias is
            ``-inf``. ``block // max(levels)`` is at most 64.
        key_valid: bool ``[B, S]`` in block order; invalid tokens count nothing, whatever they hold.
        backend: ``"triton"``, ``"cpu"``, ``"reference"`` or ``None`` for the fastest.

    Returns:
        The pooled keys; ``Se`` is ``ceil(S / block) * block`` times the sum of ``1 / L``.

    Raises:
        ValueError: shapes, ``levels`` or ``block`` do not fit, or ``backend`` cannot run here.
    """
    check_bhsd("k", k)
    check_bhsd("v", v)
    if k.shape != v.shape or k.dtype != v.dtype:
        raise ValueError(f"k and v must agree, got {tuple(k.shape)} {k.dtype} and {tuple(v.shape)} {v.dtype}")
    group = check_levels(levels, block)
    if key_valid is not None and key_valid.shape != (k.shape[0], k.shape[2]):
        raise ValueError(f"key_valid must be {(k.shape[0], k.shape[2])}, got {tuple(key_valid.shape)}")
    chosen = resolve_backend(backend, k)
    offsets, first, count = {}, 0, blocks(k.shape[2], block)
    for level in levels:
        offsets[level] = first
        first += count * (max(levels) // level)
    args = (list(levels), block, key_valid)
    if chosen == "reference":
        (pooled_k, bias), (pooled_v, _) = (pyramid_reference(x, *args) for x in (k, v))
    else:
        pooled_k, pooled_v, bias = _pyramid_op(k, v, *args, chosen == "triton")
    return Pyramid(pooled_k, pooled_v, bias, offsets, group)


def check_levels(levels: tuple[int, ...], block: int) -> int:
    """Keys in a group of the pyramid.

    Args:
        levels: tokens of a run.
        block: tokens in a key block.

    Raises:
        ValueError: see :func:`pyramid`.
    """
    if block < 2 or block & (block - 1):
        raise ValueError(f"block must be a power of two from 2 on, got {block}")
    fits = all(2 <= level <= block and not level & (level - 1) for level in levels)
    if not levels or not fits or len(set(levels)) != len(levels):
        raise ValueError(f"levels must be different powers of two from 2 to block={block}, got {levels}")
    if block // max(levels) > 64:
        raise ValueError(f"block must be at most 64 * max(levels) = {64 * max(levels)}, got {block}")
    return block // max(levels)


def pyramid_groups(level_map: Tensor, *, levels: tuple[int, ...] = (2, 4, 8)) -> Tensor:
    """Say which groups of a :func:`pyramid` stand for the blocks of a map of levels.

    Args:
        level_map: uint8 ``[B|1, H|1, Qb, Kb]``, how many tokens of the key block go into one key for that query block.
            Values that are not in ``levels`` choose no group: 0 for skipped blocks, 1 for exact ones.
        levels: as for :func:`pyramid`.

    Returns:
        bool ``[B|1, H|1, Qb, G]``, for :func:`dit_accel_kernels.gathered_from_mask`.

    Raises:
        ValueError: ``level_map`` is not a uint8 map, or a level does not fit uint8.
    """
    _check_map(level_map, levels)
    top = max(levels)
    return torch.cat([(level_map == level).repeat_interleave(top // level, -1) for level in levels], -1)


def _check_map(level_map: Tensor, levels: tuple[int, ...]) -> None:
    if level_map.ndim != 4 or level_map.dtype != torch.uint8:
        got = f"{level_map.dtype} of shape {tuple(level_map.shape)}"
        raise ValueError(f"level_map must be uint8 [B|1, H|1, Qb, Kb], got {got}")
    if not levels or max(levels) > 255:
        raise ValueError(f"levels must be from 2 to 128 to fit uint8, got {levels}")


def pyramid_rows(
    level_map: Tensor, *, levels: tuple[int, ...] = (2, 4, 8), backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The groups of a :func:`pyramid` that each query block sees, as rows of :class:`dit_accel_kernels.GatheredKeys`.

    The same as ``gathered_from_mask(pyramid_groups(level_map))``, in one pass over the map and without a mask of groups,
    so that a map can be kept in place of its rows, which take 16 times its memory (28 times from a mask).

    Args:
        level_map: as for :func:`pyramid_groups`.
        levels: as for :func:`pyramid`.
        backend: ``"triton"``, ``"cpu"``, ``"reference"`` or ``None`` for the fastest.

    Returns:
        ``row_start``, ``count`` (both int32 ``[B|1, H|1, Qb]``) and ``indices`` (int32 ``[capacity]``), where what no row
        counts is left as it comes.

    Raises:
        ValueError: see :func:`pyramid_groups`; or the rows together have 2**31 entries or more, or ``backend`` cannot run.
    """
    number = level_map[0, 0, 0, :1].float()  # of a dtype that the kernels of this package take
    if resolve_backend(backend, number) != "triton":
        return gathered_from_mask(pyramid_groups(level_map, levels=levels))
    _check_map(level_map, levels)
    most = level_map.numel() * (max(levels) // min(levels))
    if most >= 2**31:
        raise ValueError(f"rows of level_map must have fewer than 2**31 groups, got up to {most}")
    row_start, count, indices = _pyramid_rows_op(level_map, list(levels))
    return row_start, count, indices


@torch.library.custom_op("dit_accel_kernels::pyramid_rows", mutates_args=())
def _pyramid_rows_op(level_map: Tensor, levels: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    from .triton import pyramid_rows_triton

    return pyramid_rows_triton(level_map, levels)


@_pyramid_rows_op.register_fake
def _(level_map: Tensor, levels: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    rows = level_map.new_empty(level_map.shape[:3], dtype=torch.int32)
    entries = level_map.numel() * (max(levels) // min(levels))
    return rows, torch.empty_like(rows), rows.new_empty(entries)


@torch.library.custom_op("dit_accel_kernels::pyramid", mutates_args=())
def _pyramid_op(
    k: Tensor, v: Tensor, levels: list[int], block: int, key_valid: Tensor | None, use_triton: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if use_triton:
        from .triton import pyramid_triton

        return pyramid_triton(k, v, levels, block, key_valid)
    (pooled_k, bias), (pooled_v, _) = (pyramid_reference(x, levels, block, key_valid) for x in (k, v))
    return pooled_k, pooled_v, bias


@_pyramid_op.register_fake
def _(
    k: Tensor, v: Tensor, levels: list[int], block: int, key_valid: Tensor | None, use_triton: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, tokens, dim = k.shape
    extra = sum(blocks(tokens, block) * (block // level) for level in levels)
    bias = k.new_empty((1 if key_valid is None else batch, 1, extra), dtype=torch.float32)
    return k.new_empty((batch, heads, extra, dim)), v.new_empty((batch, heads, extra, dim)), bias
