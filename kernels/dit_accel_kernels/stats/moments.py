"""Mean and variance of each block of tokens, in any order of the tokens, in one pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._common import blocks, check_bhsd, eager, resolve_backend
from ..types import TokenOrder
from .moments_reference import block_moments_reference

__all__ = ["BlockMoments", "block_moments"]


class BlockMoments(NamedTuple):
    """What :func:`block_moments` returns.

    Attributes:
        mean: float32 ``[B, H, N, D]``; 0 where nothing is valid.
        variance: float32 ``[B, H, N, D]``, of the valid tokens as they are; 0 where nothing is valid.
        size: float32 ``[B|1, N]``, valid tokens.
    """

    mean: Tensor
    variance: Tensor
    size: Tensor


def block_moments(
    x: Tensor,
    *,
    block: int,
    order: TokenOrder | None = None,
    rows: Tensor | None = None,
    key_valid: Tensor | None = None,
    backend: str | None = None,
) -> BlockMoments:
    """Mean and variance of each run of ``block`` tokens in block order, read from where they are.

    Args:
        x: ``[B, H, S, D]`` in natural order, any strides, last dimension contiguous.
        block: tokens in a block; the last one may be ragged.
        order: permutation under which blocks are formed; ``None`` is natural order.
        rows: integers ``[N]``, the blocks to look at; ``None`` for all.
        key_valid: bool ``[B, S]`` in block order; invalid tokens count nothing, whatever they hold.
        backend: ``"triton"``, ``"cpu"``, ``"reference"`` or ``None`` for the fastest.

    Returns:
        The moments; ``size`` has batch size 1 if ``key_valid`` is ``None``.

    Raises:
        ValueError: shapes do not fit, or ``backend`` cannot run here.
    """
    check_bhsd("x", x)
    if block < 1:
        raise ValueError(f"a block must hold at least one token, got {block=}")
    if key_valid is not None and key_valid.shape != (x.shape[0], x.shape[2]):
        raise ValueError(f"key_valid must be {(x.shape[0], x.shape[2])}, got {tuple(key_valid.shape)}")
    if order is not None and (order.table.shape[1] != x.shape[2] or order.head.shape[0] != x.shape[1]):
        raise ValueError(
            f"order must hold {x.shape[2]} tokens and {x.shape[1]} heads, "
            f"got {order.table.shape[1]} and {order.head.shape[0]}"
        )
    table, head = (None, None) if order is None else (order.table, order.head)
    use_triton = resolve_backend(backend, x) == "triton"
    return BlockMoments(*eager(_block_moments_op, x)(x, block, table, head, rows, key_valid, use_triton))


@torch.library.custom_op("dit_accel_kernels::block_moments", mutates_args=())
def _block_moments_op(
    x: Tensor,
    block: int,
    table: Tensor | None,
    head: Tensor | None,
    rows: Tensor | None,
    key_valid: Tensor | None,
    use_triton: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if rows is None:
        rows = torch.arange(blocks(x.shape[2], block), device=x.device, dtype=torch.int32)
    if not use_triton:
        return block_moments_reference(x, block, table, head, rows, key_valid)
    from .moments_triton import block_moments_triton

    return block_moments_triton(x, block, table, head, rows, key_valid)


@_block_moments_op.register_fake
def _(
    x: Tensor,
    block: int,
    table: Tensor | None,
    head: Tensor | None,
    rows: Tensor | None,
    key_valid: Tensor | None,
    use_triton: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    count = blocks(x.shape[2], block) if rows is None else rows.shape[0]
    shape = (x.shape[0], x.shape[1], count, x.shape[3])
    sizes = (1 if key_valid is None else x.shape[0], count)
    mean = x.new_empty(shape, dtype=torch.float32)
    return mean, torch.empty_like(mean), x.new_empty(sizes, dtype=torch.float32)
