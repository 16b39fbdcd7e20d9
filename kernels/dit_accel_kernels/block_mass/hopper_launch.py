"""From tensors to a launch of the block-mass kernel for Hopper. Imports triton only when it is used."""

from __future__ import annotations

import torch
from torch import Tensor

from .._common import blocks
from .._launch import capability, launch
from ..block_sparse.hopper_call import make_descriptor, multiprocessors
from ..block_sparse.hopper_launch import has_gluon
from ..block_sparse.hopper_specs import padded
from .hopper_specs import CONSUMER_REGS, GROUP, OTHER_REGS, by_polynomial, ring_stages

__all__ = ["block_mass_hopper", "split_keys", "why_not_hopper"]

_LOG2E = 1.4426950408889634
_ROWS = 256  # of a job
_TILE = 128  # keys of a step


def why_not_hopper(q: Tensor, k: Tensor, block_q: int, block_k: int) -> str | None:
    """Say why the Hopper kernel cannot compute a block mass, or return ``None``.

    Args:
        q: ``[B, H, Sq, D]``.
        k: ``[B, H, Sk, D]``.
        block_q: queries that are averaged for an entry.
        block_k: keys in a key block.
    """
    if capability(q) != 90:
        return "device must be an NVIDIA GPU of compute capability 9.0"
    if not has_gluon():
        return "triton must have Gluon with warp specialisation (3.6 or newer)"
    if q.dtype not in (torch.bfloat16, torch.float16) or k.dtype != q.dtype:
        return f"dtype must be bfloat16 or float16, got {q.dtype} and {k.dtype}"
    if q.shape[3] % 8 or q.shape[3] > 128:
        return f"head_dim must be a multiple of 8 of at most 128, got {q.shape[3]}"
    if block_q not in (16, 32, 64, 128):
        return f"queries of an entry must be 16, 32, 64 or 128, got {block_q}"
    if block_k not in (64, 128):
        return f"block_k must be 64 or 128, got {block_k}"
    for name, x in (("q", q), ("k", k)):
        steps = [2 * step for size, step in zip(x.shape[:3], x.stride()[:3]) if size > 1]
        if x.data_ptr() % 16 or any(step % 16 or step <= 0 for step in steps):
            return f"{name} must have an address and strides that are multiples of 16 bytes, got {x.stride()}"
    return None


def split_keys(row_jobs: int, tiles: int, programs: int) -> int:
    """Tiles of keys of a job, an even number, such that all programs end at about the same time.

    Args:
        row_jobs: row tiles of all heads.
        tiles: tiles of keys.
        programs: programs that run at once.
    """

    def rounds(chunk: int) -> float:
        # A job costs its tiles and about as much as two more to begin and end.
        return blocks(row_jobs * blocks(tiles, chunk), programs) * (chunk + 2.0)

    chunks = {min(2 * blocks(tiles, 2 * parts), 2 * blocks(tiles, 2)) for parts in range(1, 17)}
    return min(sorted(chunks, reverse=True), key=rounds)


def block_mass_hopper(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
    rows: Tensor | None,
    table: Tensor | None,
    head: Tensor | None,
    key_valid: Tensor | None,
    step: int = 1,
) -> Tensor:
    """Softmax mass per block; see :func:`dit_accel_kernels.block_mass` and :func:`.reference.block_mass_reference`."""
    from .hopper import block_mass_hopper_kernel
    from .hopper_schedule import mass_rows

    batch, heads, queries, dim = q.shape
    keys, key_blocks = k.shape[2], blocks(k.shape[2], block_k)
    entries = blocks(queries, block_q * step) if rows is None else rows.shape[0]
    row_tiles, tiles = blocks(entries * block_q, _ROWS), blocks(keys, _TILE)
    most = multiprocessors(q.device)
    chunk = split_keys(batch * heads * row_tiles, tiles, most)
    splits = blocks(tiles, chunk)
    jobs = batch * heads * row_tiles * splits
    out = torch.empty(batch, heads, entries, key_blocks, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        token, shift = mass_rows(lse, block_q, rows, table, head, step)
        launch(block_mass_hopper_kernel, (min(most, jobs),))(
            make_descriptor(k, _TILE, padded(dim)), q, token, shift,
            None if key_valid is None else key_valid.contiguous(), out, scale * _LOG2E,
            entries * block_q, entries, keys, key_blocks, jobs, min(most, jobs), row_tiles, heads, splits, chunk, tiles,
            token.shape[1] if token.shape[0] > 1 else 0, *(n // 8 for n in q.stride()[:3]),
            D=padded(dim), DIM=dim, STAGES=ring_stages(dim), GROUP=GROUP, PER=_TILE // block_k,
            JOIN=block_q == 128, EACH=max(1, 64 // block_q), EVEN_K=keys % block_k == 0,
            HAS_VALID=key_valid is not None, CONSUMER_REGS=CONSUMER_REGS, OTHER_REGS=OTHER_REGS,
            POLYNOMIALS=by_polynomial(dim), num_warps=4,
        )  # fmt: skip
    return out
