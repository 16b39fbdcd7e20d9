"""From mean queries to a launch of the kernel for Hopper, and what it cannot serve. Imports triton only when it is used."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from .._common import blocks
from .._launch import capability, launch
from ..block_sparse.hopper_call import make_descriptor, multiprocessors
from ..block_sparse.hopper_launch import has_gluon
from ..block_sparse.hopper_specs import padded
from ..lists import pack_bits, unpack_bits
from ..types import Pooled
from .hopper_specs import MeansConfig, means_config
from .reference import residual_reference

__all__ = ["defined_rows", "residual_hopper", "self_test", "share_out", "why_not_hopper"]

_LOG2E = 1.0 / math.log(2.0)
_TILE = 64  # keys of a step
_MERGED = {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}  # rows and pooled keys of a program
_tested: dict[tuple[torch.device, torch.dtype, int, int], str | None] = {}


def why_not_hopper(query: Tensor, key: Tensor, value: Tensor, key_valid: Tensor | None, block_k: int) -> str | None:
    """Say why the Hopper kernel cannot compute a correction, or return ``None``.

    Args:
        query: ``[B, H, Sq, D]``.
        key: ``[B, H, Sk, D]``.
        value: like ``key``.
        key_valid: keys that count, if not all.
        block_k: keys in a key block.
    """
    if capability(query) != 90:
        return "device must be an NVIDIA GPU of compute capability 9.0"
    if not has_gluon():
        return "triton must have Gluon with warp specialisation (3.6 or newer)"
    if query.dtype not in (torch.bfloat16, torch.float16) or {key.dtype, value.dtype} != {query.dtype}:
        return f"dtype must be bfloat16 or float16, got {query.dtype}, {key.dtype} and {value.dtype}"
    if query.shape[3] % 8 or query.shape[3] > 128:
        return f"head_dim must be a multiple of 8 of at most 128, got {query.shape[3]}"
    if block_k % _TILE:
        return f"block_k must be a multiple of {_TILE}, got {block_k}"
    if key_valid is not None:
        return "a mask of keys is not supported"
    for name, x in (("key", key), ("value", value)):
        steps = [2 * step for size, step in zip(x.shape[:3], x.stride()[:3]) if size > 1]
        if x.data_ptr() % 16 or any(step % 16 or not 0 < step < 2**40 for step in steps):
            return f"{name} must have an address and strides that are multiples of 16 bytes, got {x.stride()}"
    return None


def self_test(device: torch.device, dtype: torch.dtype, head_dim: int, block_k: int) -> str | None:
    """Compare the kernel with the reference on some thousand tokens, once a process and device.

    Args:
        device: where it runs.
        dtype: of queries, keys and values.
        head_dim: columns of a head.
        block_k: keys in a key block.

    Returns:
        What is wrong, or ``None``.
    """
    key = (device, dtype, padded(head_dim), block_k)
    if key not in _tested:
        if torch.cuda.is_current_stream_capturing():
            return "a CUDA graph is being captured, and the self-test has not run"
        try:
            error = _error(device, dtype, head_dim, block_k)
            _tested[key] = None if error < 0.02 else f"the correction differs from the reference by {error:.3g}"
        except Exception as error:  # whatever a compiler or driver throws is a reason not to use it
            _tested[key] = f"self-test raised {type(error).__name__}: {error}"
        if _tested[key] is not None:
            warnings.warn(f"the Hopper form of the correction at mean queries is off: {_tested[key]}", stacklevel=2)
    return _tested[key]


def _error(device: torch.device, dtype: torch.dtype, dim: int, block_k: int) -> float:
    """Relative error on 5,700 keys, the last block ragged, and 300 mean queries of each of two heads.

    Segments have several tiles then, and in bfloat16 logits of the second head differ so much that they must be done again.
    Some rows there keep nothing that counts beside their largest logit; what they lack is undefined: they are left out.
    """
    gen = torch.Generator().manual_seed(0)
    shapes = ((1, 2, 300, dim), *((1, 2, 5700, dim),) * 2, *((1, 2, blocks(5700, block_k), dim),) * 2)
    means, key, value, pool_k, pool_v = (torch.randn(s, generator=gen).to(device, dtype) for s in shapes)
    if dtype == torch.bfloat16:
        means[:, 1] *= 100
    levels = (torch.rand(1, 2, 300, pool_k.shape[2], generator=gen) < 0.4).to(device, torch.uint8)
    pooled = Pooled(pool_k, pool_v, torch.full((1, 1, pool_k.shape[2]), 3.0, device=device), pack_bits(levels))
    got = residual_hopper(means, key, value, pooled, block_k, dim**-0.5).float()
    wide = Pooled(pool_k.float(), pool_v.float(), pooled.bias, pooled.bits)
    want = residual_reference(means.float(), key.float(), value.float(), wide, None, block_k, dim**-0.5)
    off = (got - want)[defined_rows(means, key, pooled, block_k, dim**-0.5)]
    return float(off.norm() / want.norm())


def defined_rows(means: Tensor, key: Tensor, pooled: Pooled, block_k: int, scale: float) -> Tensor:
    """Rows that keep a key or a mean whose weight is not lost beside that of the largest logit: bool ``[B, H, Qb]``."""
    room = 6 if means.dtype == torch.float16 else 80  # natural units that weights may lie apart
    seen = unpack_bits(pooled.bits, pooled.k.shape[2]).bool()
    logits = means.float() @ key.float().mT * scale
    kept = logits.masked_fill(~seen.repeat_interleave(block_k, -1)[..., : key.shape[2]], -torch.inf).amax(-1)
    extra = means.float() @ pooled.k.float().mT * scale + pooled.bias[:, :, None]
    return torch.maximum(kept, extra.masked_fill(seen, -torch.inf).amax(-1)) > logits.amax(-1) - room


def share_out(row_tiles: int, work: int, programs: int) -> tuple[int, int]:
    """Members of a group and groups, such that the longest program is short.

    Args:
        row_tiles: tiles of mean queries of a head.
        work: tiles of keys of all heads.
        programs: programs that run at once.
    """

    def longest(members: int) -> int:
        return blocks(row_tiles, members) * blocks(work, min(programs // members, work))

    rounds = range(1, row_tiles + 1)
    candidates = {blocks(row_tiles, turns) for turns in rounds if blocks(row_tiles, turns) <= programs}
    members = min(sorted(candidates, reverse=True), key=longest)
    return members, min(programs // members, work)


def residual_hopper(
    means: Tensor,
    key: Tensor,
    value: Tensor,
    pooled: Pooled,
    block_k: int,
    scale: float,
    config: MeansConfig | None = None,
) -> Tensor:
    """See :func:`dit_accel_kernels.query_means.mean_query_residual`, with contiguous means ``[B, H, Qb, D]``."""
    from .hopper import query_means_hopper_kernel
    from .merge import merge_kernel
    from .triton import step

    batch, heads, rows, dim = means.shape
    config = means_config(dim) if config is None else config
    d, tile_rows = padded(dim), 64 * config.warpgroups
    sk, kb = key.shape[2], pooled.k.shape[2]
    planes, tiles, row_tiles = batch * heads, blocks(sk, _TILE), blocks(rows, tile_rows)
    members, groups = share_out(row_tiles, planes * tiles, multiprocessors(means.device))
    share = blocks(planes * tiles, groups)
    slots = (groups + planes) * row_tiles
    sums = torch.empty(slots, 3, tile_rows, dtype=torch.float32, device=means.device)
    accs = torch.empty(slots, 2, tile_rows, d, dtype=torch.float32, device=means.device)
    flags = torch.empty(slots, config.warpgroups, dtype=torch.int32, device=means.device)
    out = torch.empty_like(means)
    bits, bias = pooled.bits.contiguous(), pooled.bias.contiguous()
    strides = [step(x.shape[i], x.stride(i)) for x in (bits, bias) for i in (0, 1)]
    tensors = (make_descriptor(means, 64, d), make_descriptor(key, _TILE, d), make_descriptor(value, _TILE, d))
    sizes = (heads, rows, sk, blocks(kb, 32), *strides[:2], row_tiles, members, share, planes * tiles, tiles)
    fast = config.fast and means.dtype == torch.bfloat16  # float16 has too little range
    with torch.cuda.device_of(means):
        for retry in (False, True) if fast else (False,):
            launch(query_means_hopper_kernel, (members * groups,))(
                *tensors, bits, sums, accs, flags, scale * _LOG2E, *sizes,
                D=d, BLOCK_K=block_k, WARPGROUPS=config.warpgroups, STAGES=config.stages,
                FAST=fast and not retry, OVERLAP=config.overlap and fast and not retry, RETRY=retry,
                CONSUMER_REGS=config.consumer_regs, LOADER_REGS=config.loader_regs, num_warps=4,
            )  # fmt: skip
        launch(merge_kernel, (blocks(rows, _MERGED["BLOCK_M"]), planes))(
            means, pooled.k.contiguous(), pooled.v.contiguous(), bias, bits, sums, accs, out, scale * _LOG2E,
            rows, kb, heads, row_tiles, share, tiles, *strides,
            DIM=dim, WIDTH=d, ROWS=tile_rows, **_MERGED,
        )  # fmt: skip
    return out
