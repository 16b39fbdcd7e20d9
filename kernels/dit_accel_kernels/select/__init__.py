"""The best blocks of each group of a map, without sorting it and without a host synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor

from .._common import eager, resolve_backend
from .reference import keep_best_reference, unkept_energy_reference

__all__ = ["keep_best", "unkept_energy"]


def _use_triton(scores: Tensor, backend: str | None) -> bool:
    if scores.dtype != torch.float32:
        raise ValueError(f"scores must be float32, got {scores.dtype}")
    return resolve_backend(backend, scores.view(-1)) == "triton"


def keep_best(
    scores: Tensor,
    count: int,
    *,
    by_head: bool,
    rows: Tensor | None = None,
    cols: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Keep the best blocks of each head or of each row, at least one in each row, and what is kept whatever its score.

    Forced columns come first among the best; forced rows come on top.

    Args:
        scores: float32 ``[B, H, Qb, Kb]``; values that are not finite count as 0.
        count: blocks of a head, or of a row, that are kept.
        by_head: whether ``count`` is of a head, so that easy rows give to hard ones.
        rows: bool ``[Qb]``, rows that are kept whole.
        cols: bool ``[Kb]``, columns that are kept whole.
        backend: ``"triton"``, ``"cpu"``, ``"reference"`` or ``None`` for the fastest.

    Returns:
        uint8 ``[B, H, Qb, Kb]`` of 0 and 1. Of equal scores at the border some are kept, so that the count is met.

    Raises:
        ValueError: wrong dtype, shape or count, or ``backend`` cannot run here.
    """
    if scores.ndim != 4:
        raise ValueError(f"scores must be [B, H, Qb, Kb], got shape {tuple(scores.shape)}")
    size = scores.shape[3] * (scores.shape[2] if by_head else 1)
    if not 1 <= count <= size:
        raise ValueError(f"count must be between 1 and {size}, got {count}")
    for name, flags, length in (("rows", rows, scores.shape[2]), ("cols", cols, scores.shape[3])):
        if flags is not None and (flags.shape != (length,) or flags.dtype != torch.bool):
            raise ValueError(f"{name} must be bool [{length}], got {flags.dtype} {list(flags.shape)}")
    scores = scores.contiguous()
    return eager(_keep_best_op, scores)(scores, count, by_head, rows, cols, _use_triton(scores, backend))


def unkept_energy(scores: Tensor, count: int, *, backend: str | None = None) -> Tensor:
    """Sum of the squares of all but the ``count`` largest of each row; scores are taken to be no less than 0.

    Args:
        scores: float32 ``[..., N]``; values that are not finite count as 0.
        count: how many of a row are left out.
        backend: ``"triton"``, ``"cpu"``, ``"reference"`` or ``None`` for the fastest.

    Returns:
        float32 ``[...]``.

    Raises:
        ValueError: wrong dtype or count, or ``backend`` cannot run here.
    """
    if not 1 <= count <= scores.shape[-1]:
        raise ValueError(f"count must be between 1 and {scores.shape[-1]}, got {count}")
    scores = scores.contiguous()
    return eager(_unkept_energy_op, scores)(scores, count, _use_triton(scores, backend))


@torch.library.custom_op("dit_accel_kernels::keep_best", mutates_args=())
def _keep_best_op(
    scores: Tensor, count: int, by_head: bool, rows: Tensor | None, cols: Tensor | None, use_triton: bool
) -> Tensor:
    if not use_triton:
        return keep_best_reference(scores, count, by_head, rows, cols)
    from .triton import keep_best_triton

    return keep_best_triton(scores, count, by_head, rows, cols)


@_keep_best_op.register_fake
def _(scores: Tensor, count: int, by_head: bool, rows: Tensor | None, cols: Tensor | None, use_triton: bool) -> Tensor:
    return torch.empty_like(scores, dtype=torch.uint8)


@torch.library.custom_op("dit_accel_kernels::unkept_energy", mutates_args=())
def _unkept_energy_op(scores: Tensor, count: int, use_triton: bool) -> Tensor:
    if not use_triton:
        return unkept_energy_reference(scores, count)
    from .triton import unkept_energy_triton

    return unkept_energy_triton(scores, count)


@_unkept_energy_op.register_fake
def _(scores: Tensor, count: int, use_triton: bool) -> Tensor:
    return scores.new_empty(scores.shape[:-1])
