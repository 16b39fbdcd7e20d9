"""Mean and absolute maximum of each block of tokens, in one pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._common import blocks, check_bhsd, eager, resolve_backend
from .reference import block_stats_reference

__all__ = ["BlockStats", "block_stats"]


class BlockStats(NamedTuple):
    """What :func:`block_stats` returns.

    Attributes:
        mean: ``[B, H, Kb, D]`` of the dtype of the input, accumulated in float32; 0 where nothing is valid.
        absmax: float32 ``[B, H, Kb, D]``, largest magnitude per channel; 0 where nothing is valid.
        count: int32 ``[B|1, Kb]``, valid tokens in each block. ``count.log()`` is the bias of ``Pooled``.
    """

    mean: Tensor
    absmax: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody calls on it


def block_stats(x: Tensor, *, block: int, key_valid: Tensor | None = None, backend: str | None = None) -> BlockStats:
    """Mean, absolute maximum and valid count of each run of ``block`` tokens.

    Args:
        x: ``[B, H, S, D]``, any strides, last dimension contiguous.
        block: tokens in a block; the last one may be ragged.
        key_valid: bool ``[B, S]`` in the order of ``x``; invalid tokens count nothing, whatever they hold.
        backend: ``"triton"``, ``"cpu"``, ``"reference"`` or ``None`` for the fastest.

    Returns:
        The statistics; ``count`` has batch size 1 if ``key_valid`` is ``None``.

    Raises:
        ValueError: shapes do not fit, or ``backend`` cannot run here.
    """
    check_bhsd("x", x)
    if block < 1:
        raise ValueError(f"a block must hold at least one token, got {block=}")
    if key_valid is not None and key_valid.shape != (x.shape[0], x.shape[2]):
        raise ValueError(f"key_valid must be {(x.shape[0], x.shape[2])}, got {tuple(key_valid.shape)}")
    chosen = resolve_backend(backend, x)
    if chosen == "reference":
        return BlockStats(*block_stats_reference(x, block, key_valid))
    return BlockStats(*eager(_block_stats_op, x)(x, block, key_valid, chosen == "triton"))


@torch.library.custom_op("dit_accel_kernels::block_stats", mutates_args=())
def _block_stats_op(x: Tensor, block: int, key_valid: Tensor | None, use_triton: bool) -> tuple[Tensor, Tensor, Tensor]:
    if not use_triton:
        return block_stats_reference(x, block, key_valid)
    from .triton import block_stats_triton

    return block_stats_triton(x, block, key_valid)


@_block_stats_op.register_fake
def _(x: Tensor, block: int, key_valid: Tensor | None, use_triton: bool) -> tuple[Tensor, Tensor, Tensor]:
    count = blocks(x.shape[2], block)
    shape = (x.shape[0], x.shape[1], count, x.shape[3])
    batch = 1 if key_valid is None else x.shape[0]
    return (
        x.new_empty(shape),
        x.new_empty(shape, dtype=torch.float32),
        x.new_empty((batch, count), dtype=torch.int32),
    )
