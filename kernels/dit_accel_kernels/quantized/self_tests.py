"""A backend against the reference on the same codes, with a mask that dense attention would fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..lists import lists_from_levels, pack_bits
from ..quantize import Precision, quantize_qkv
from ..types import Pooled, TokenOrder
from .reference import quantized_reference

__all__ = ["TOLERANCE", "compare"]

# Largest difference of an output of about unit size, by the type in which weights and values are multiplied. The weights
# of e4m3 have three bits after the leading one, so each is off by up to 6 %, at random; those of INT8 by up to half a
# percent of the largest of their tile, which counts where a row sees few keys.
TOLERANCE = {"bf16": 2e-2, "int8": 6e-2, "fp8": 4e-2}
# The Hopper kernel's log-sum-exp with e4m3 weights is that of the rounded weights, 1 to 3 % of a sum of some hundred.
_LSE_TOLERANCE = {"bf16": 1e-3, "int8": 6e-2, "fp8": 6e-2}


def compare(
    run: Callable[..., tuple[Tensor, Tensor]],
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    block_q: int,
    block_k: int,
    precision: Precision,
    *,
    tokens: int,
) -> str | None:
    """Run a backend and the reference on the same inputs.

    Args:
        run: the backend, called with ``q, made, lists`` and keywords as in :data:`.backends.BACKENDS`.
        device: where the backend runs.
        dtype: of queries, keys and values as they are given.
        head_dim: columns of a head.
        block_q: tokens in a query block.
        block_k: tokens in a key block.
        precision: the number formats.
        tokens: queries, and keys.

    Returns:
        What differs by more than the tolerance, or ``None``.
    """
    gen = torch.Generator().manual_seed(0)
    qb, kb = -(-tokens // block_q), -(-tokens // block_k)

    def draw(count: int) -> Tensor:
        return torch.randn(1, 2, count, head_dim, generator=gen).to(device, dtype)

    q, k, v = draw(tokens), draw(tokens) + 1, draw(tokens)  # a mean that smoothing must give back
    # A checkerboard with the ragged last block visited by every other row; head 1 has the opposite one.
    board = (torch.arange(qb)[:, None] + torch.arange(kb)) % 2
    levels = torch.stack([board, 1 - board])[None].to(device, torch.uint8)
    lists = lists_from_levels(levels, block_q, block_k)
    count = torch.full((kb,), float(block_k))
    count[-1] = tokens - (kb - 1) * block_k
    pooled = Pooled(draw(kb), draw(kb), count.log().to(device)[None, None], pack_bits(levels))
    table = torch.stack([torch.randperm(tokens, generator=gen), torch.arange(tokens).flip(0)])
    order = TokenOrder(table.to(device, torch.int32), torch.tensor([0, 1], dtype=torch.int32, device=device))
    tolerance, scale = TOLERANCE[precision.pv], head_dim**-0.5
    dense = torch.softmax((q.float() @ k.float().mT) * scale, -1) @ v.float()
    cases: list[tuple[str, dict[str, Any]]] = [
        ("without a remainder", {}),
        ("with an order", {"order": order}),
        ("with a pooled remainder", {"pooled": pooled}),
        ("with a remainder and an order", {"pooled": pooled, "order": order}),
    ]
    for what, given in cases:
        options: dict[str, Any] = {"scale": scale, "order": None, "pooled": None, "key_valid": None, **given}
        made = quantize_qkv(q, k, v, precision, block_k=block_k, order=options["order"], backend="reference")
        want, want_lse = quantized_reference(q, made, lists, **options)
        got, got_lse = run(q, made, lists, return_lse=True, **options)
        if _differ(want, dense) < 5 * tolerance:
            return f"the self-test's mask is too weak to tell sparse from dense {what}"
        seen = want_lse.isfinite()
        error, off = _differ(got, want), _differ(got_lse[seen], want_lse[seen])
        if not error <= tolerance:
            return f"output differs from the reference by {error:.3g} {what}, at most {tolerance:g} is allowed"
        if not off <= _LSE_TOLERANCE[precision.pv]:
            allowed = _LSE_TOLERANCE[precision.pv]
            return f"log-sum-exp differs from the reference by {off:.3g} {what}, at most {allowed:g} is allowed"
    return None


def _differ(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want.float()).abs().max().item())
