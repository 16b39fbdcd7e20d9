"""FlexAttention of torch (arXiv 2412.05496) on our lists: an optional backend, compiled on GPUs and eager on CPUs.

What our kernels take besides blocks of keys enters as further keys: pooled means and gathered keys stand behind the keys,
in blocks of their own, with a bias by ``score_mod`` and the rows that see them by ``mask_mod``. Eager mode looks at
``mask_mod`` alone and not at the lists, so that it says everything.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..lists import LEVEL_FULL, LEVEL_PARTIAL, levels_from_lists, unpack_bits
from ..permute import permute_tokens, unpermute_tokens
from ..types import BlockLists, GatheredKeys, Pooled, TokenOrder, TokenWindows

__all__ = ["block_sparse_flex", "flex_lists", "why_not_flex"]


def why_not_flex(*, device: torch.device, dtype: torch.dtype, head_dim: int, block_q: int, block_k: int) -> str | None:
    """Say why FlexAttention cannot serve, or return ``None``; see :func:`dit_accel_kernels.backends.why_not`."""
    if importlib.util.find_spec("torch.nn.attention.flex_attention") is None:
        return f"torch must have FlexAttention (2.6 or newer), got {torch.__version__}"
    if device.type not in ("cuda", "cpu"):
        return f"device must be cuda or cpu, got {device}"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "triton is not installed, and without it FlexAttention computes the whole map"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"dtype must be bfloat16, float16 or float32, got {dtype}"
    if device.type == "cuda" and (head_dim < 16 or head_dim > 256):
        return f"head_dim must be between 16 and 256, got {head_dim}"
    for name, size in (("block_q", block_q), ("block_k", block_k)):
        if size % 16:
            return f"{name} must be a multiple of 16, got {size}"
    return None


@dataclass(frozen=True)
class _Further:
    """Keys behind the keys: pooled and gathered ones."""

    k: Tensor  # [B, H, E, D]
    v: Tensor
    bias: Tensor  # float32 [B|1, H|1, E], finite
    seen: Tensor  # bool [B|1, H|1, Qb, E]


def block_sparse_flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    *,
    scale: float,
    order: TokenOrder | None = None,
    pooled: Pooled | None = None,
    windows: TokenWindows | None = None,
    key_valid: Tensor | None = None,
    gathered: GatheredKeys | None = None,
    return_lse: bool = True,
) -> tuple[Tensor, Tensor]:
    """Compute what :func:`~.reference.block_sparse_reference` means with FlexAttention.

    Arguments and results as of :attr:`dit_accel_kernels.backends.Backend.run`. Keys that nobody sees must be finite on a
    CPU, where every logit is computed.
    """
    from torch.nn.attention.flex_attention import BlockMask

    sq, sk, (bq, bk) = q.shape[2], k.shape[2], (lists.block_q, lists.block_k)
    moved = q if order is None else permute_tokens(q, order)
    further = _further(lists, pooled, gathered)
    whole = -(-sk // bk) * bk
    levels = levels_from_lists(lists, whole // bk)
    keys, values = (pad(x, (0, 0, 0, whole - sk)) for x in (k, v))
    score_mod = None
    if further is not None:
        keys, values = torch.cat([keys, further.k], 2), torch.cat([values, further.v], 2)
        more = pad(further.seen, (0, -further.seen.shape[3] % bk)).unflatten(3, (-1, bk)).any(4)
        levels, more = _alike(levels, more.to(torch.uint8) * LEVEL_PARTIAL)
        levels = torch.cat([levels, more], 3)
        score_mod = _score_mod(further, whole)
    mask_mod = _mask_mod(levels, windows, key_valid, further, sk, whole, bq, bk)
    needs_mask = windows is not None or key_valid is not None
    parts = flex_lists(levels, all_partial=needs_mask, ragged=whole // bk - 1 if sk < whole else None)
    mask = BlockMask.from_kv_blocks(
        *parts, BLOCK_SIZE=(bq, bk), mask_mod=mask_mod, seq_lengths=(sq, keys.shape[2]), compute_q_blocks=False
    )
    out, lse = _call(moved.contiguous(), keys.contiguous(), values.contiguous(), score_mod, mask, scale, (bq, bk))
    empty = lse == -torch.inf
    out = torch.where(empty[..., None], 0.0, out).to(q.dtype)
    if order is not None:
        out, lse = unpermute_tokens(out, order), unpermute_tokens(lse[..., None].contiguous(), order)[..., 0]
    return torch.empty_like(q).copy_(out), lse.to(torch.float32)


def flex_lists(
    levels: Tensor, *, all_partial: bool = False, ragged: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The lists of ``BlockMask.from_kv_blocks`` of a mask of blocks.

    Args:
        levels: uint8 ``[B|1, H|1, Qb, Kb]`` of 0, 1 and 255.
        all_partial: evaluate ``mask_mod`` in whole blocks, too.
        ragged: a block whose last keys are padding, in which it must be evaluated.

    Returns:
        Number and ids of partial blocks and of whole blocks, int32 ``[B|1, H|1, Qb]`` and ``[B|1, H|1, Qb, Kb]``.
    """
    whole = (levels == LEVEL_FULL) & (not all_partial)
    if ragged is not None:
        whole[..., ragged] = False
    some = (levels != 0) & ~whole
    return _ids(some) + _ids(whole)


def _ids(chosen: Tensor) -> tuple[Tensor, Tensor]:
    ids = chosen.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32), ids.to(torch.int32).contiguous()


def _alike(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors whose first two dimensions have been broadcast against each other."""
    shape = [max(n, m) for n, m in zip(a.shape[:2], b.shape[:2])]
    return a.expand(*shape, -1, -1), b.expand(*shape, -1, -1)


def _further(lists: BlockLists, pooled: Pooled | None, gathered: GatheredKeys | None) -> _Further | None:
    """Pooled and gathered keys with the rows that see them."""
    found: list[_Further] = []
    if pooled is not None:
        seen = (unpack_bits(pooled.bits, pooled.k.shape[2]) == 0) & (pooled.bias > -torch.inf)[:, :, None]
        found.append(_Further(pooled.k, pooled.v, pooled.bias, seen))
    if gathered is not None:
        rows = BlockLists(gathered.row_start, gathered.count, None, gathered.indices, lists.block_q, gathered.group)
        extra = gathered.k.shape[2]
        seen = levels_from_lists(rows, -(-extra // gathered.group)).repeat_interleave(gathered.group, -1)[..., :extra]
        hidden = (gathered.bias == -torch.inf)[..., None]
        seen = (seen != 0) & ~hidden[..., 0][:, :, None]
        k, v = (x.masked_fill(hidden, 0) for x in (gathered.k, gathered.v))
        found.append(_Further(k, v, gathered.bias, seen))
    if not found:
        return None
    bias, seen = found[0].bias[:, :, None], found[0].seen
    for one in found[1:]:
        bias = torch.cat(_alike(bias, one.bias[:, :, None]), -1)
        seen = torch.cat(_alike(seen, one.seen), -1)
    finite = bias[:, :, 0].masked_fill(bias[:, :, 0] == -torch.inf, 0.0)
    return _Further(torch.cat([x.k for x in found], 2), torch.cat([x.v for x in found], 2), finite, seen)


def _score_mod(further: _Further, whole: int) -> Callable[..., Tensor]:
    """Add the bias of further keys, which begin at key ``whole``."""
    bias = further.bias.contiguous()
    batch, heads, count = bias.shape

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        place = (j - whole).clamp(0, count - 1)
        return torch.where(j >= whole, score + bias[b % batch, h % heads, place], score)

    return score_mod


def _mask_mod(
    levels: Tensor,
    windows: TokenWindows | None,
    key_valid: Tensor | None,
    further: _Further | None,
    sk: int,
    whole: int,
    block_q: int,
    block_k: int,
) -> Callable[..., Tensor]:
    """Say of each query and key whether it counts, the lists included."""
    levels = levels.contiguous()
    batch, heads, rows, columns = levels.shape
    seen = None if further is None else further.seen.contiguous()

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        row = (i // block_q).clamp(max=rows - 1)
        level = levels[b % batch, h % heads, row, (j // block_k).clamp(max=columns - 1)]
        key = j.clamp(max=sk - 1)
        counts = (level != 0) & (j < sk)
        if windows is not None:
            query = i.clamp(max=windows.q_lo.shape[1] - 1)
            inside = windows.k_code[0, key] < 0
            near = windows.k_code[0, key] >= windows.q_lo[0, query]
            for axis in range(3):
                code = windows.k_code[axis, key]
                near = near & (windows.q_lo[axis, query] <= code) & (code < windows.q_hi[axis, query])
            counts = counts & ((level == LEVEL_FULL) | inside | near)
        if key_valid is not None:
            counts = counts & key_valid[b, key]
        if seen is not None:
            place = (j - whole).clamp(0, seen.shape[3] - 1)
            further_counts = seen[b % seen.shape[0], h % seen.shape[1], row, place] & (j < whole + seen.shape[3])
            counts = torch.where(j >= whole, further_counts, counts)
        return counts

    return mask_mod


@lru_cache(maxsize=1)
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _call(
    q: Tensor, k: Tensor, v: Tensor, score_mod: Any, mask: Any, scale: float, blocks: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """FlexAttention and its log-sum-exp, whatever the release of torch calls it."""
    from torch.nn.attention import flex_attention as module

    options: dict[str, Any] = {"score_mod": score_mod, "block_mask": mask, "scale": scale}
    if q.is_cuda:  # tiles must divide the blocks
        options["kernel_options"] = {"BLOCK_M": min(128, blocks[0]), "BLOCK_N": min(64, blocks[1])}
    function = _compiled() if q.is_cuda else module.flex_attention
    request = getattr(module, "AuxRequest", None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        if request is None:  # torch 2.8 and older
            out, lse = function(q, k, v, return_lse=True, **options)
            return out, lse
        out, more = function(q, k, v, return_aux=request(lse=True), **options)
        return out, more.lse
