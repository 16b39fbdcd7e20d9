"""A backend against the masked reference, on some hundred tokens and a mask that dense attention would fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from .lists import gathered_from_mask, lists_from_levels, pack_bits
from .types import BlockLists, GatheredKeys, Pooled, TokenOrder, TokenWindows

__all__ = ["compare"]

_Run = Callable[..., tuple[Tensor, Tensor]]
_GROUP = 8


@dataclass(frozen=True)
class _Site:
    """Where and on what the test runs; draws random numbers that are the same in every process."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    block_q: int
    block_k: int
    tokens: int
    gen: torch.Generator

    def draw(self, tokens: int) -> Tensor:
        """Normal ``[1, 2, tokens, D]``."""
        shape = (1, 2, tokens, self.head_dim)
        return torch.randn(shape, generator=self.gen).to(self.device, self.dtype)


def compare(
    run: _Run,
    reference: _Run,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    block_q: int,
    block_k: int,
    *,
    tokens: int,
) -> str | None:
    """Run a backend and the reference on the same inputs.

    Args:
        run: the backend, as in :attr:`dit_accel_kernels.backends.Backend.run`.
        reference: called in the same way.
        device: where the backend runs.
        dtype: of queries, keys and values.
        head_dim: columns of a head.
        block_q: tokens in a query block.
        block_k: tokens in a key block.
        tokens: queries, and keys.

    Returns:
        What differs by more than the tolerance of ``dtype``, or ``None``.
    """
    site = _Site(device, dtype, head_dim, block_q, block_k, tokens, torch.Generator().manual_seed(0))
    q, k, v = site.draw(tokens), site.draw(tokens), site.draw(tokens)
    tolerance = 2e-5 if dtype in (torch.float32, torch.float64) else 2e-2
    scale = head_dim**-0.5
    dense = torch.softmax((q.float() @ k.float().mT) * scale, -1) @ v.float()
    nothing = dict.fromkeys(("order", "pooled", "windows", "key_valid", "gathered"))
    for what, lists, given in _cases(site):
        options: dict[str, Any] = {**nothing, **given}
        # In float64, lest a process-wide permission of TF32 spoil the reference.
        wide = options | {name: _double(options[name]) for name in ("pooled", "gathered")}
        qkv = (x.double() for x in (q, k, v))
        want, want_lse = reference(*qkv, lists, scale=scale, return_lse=True, **wide)
        got, got_lse = run(q, k, v, lists, scale=scale, return_lse=True, **options)
        if _differ(want, dense) < 10 * tolerance:
            return f"the self-test's mask is too weak to tell sparse from dense {what}"
        seen = want_lse.isfinite()
        for label, error in (("output", _differ(got, want)), ("log-sum-exp", _differ(got_lse[seen], want_lse[seen]))):
            if not error <= tolerance:
                return f"{label} differs from the reference by {error:.3g} {what}, at most {tolerance:g} is allowed"
    return None


def _cases(site: _Site) -> list[tuple[str, BlockLists, dict[str, Any]]]:
    """What is tried: a name, the lists and the further arguments."""
    device, tokens, block_q, block_k, gen = site.device, site.tokens, site.block_q, site.block_k, site.gen
    qb, kb = -(-tokens // block_q), -(-tokens // block_k)
    # A checkerboard with the ragged last block visited by every other row; head 1 has the opposite one.
    board = (torch.arange(qb)[:, None] + torch.arange(kb)) % 2
    levels = torch.stack([board, 1 - board])[None].to(device, torch.uint8)
    lists = lists_from_levels(levels, block_q, block_k)
    count = torch.full((kb,), float(block_k))
    count[-1] = tokens - (kb - 1) * block_k
    pooled = Pooled(site.draw(kb), site.draw(kb), count.log().to(device)[None, None], pack_bits(levels))
    order = TokenOrder(
        torch.stack([torch.randperm(tokens, generator=gen), torch.arange(tokens).flip(0)]).to(device, torch.int32),
        torch.tensor([0, 1], dtype=torch.int32, device=device),
    )
    # Places on a grid of 8 by 8 tokens a frame: near each other within a block, lest a backend pass them on to another one.
    place = torch.arange(tokens, dtype=torch.int32)
    codes = torch.stack([place // 64, place // 8 % 8, place % 8])
    reach = torch.randint(0, 4, (2, 3, tokens), generator=gen, dtype=torch.int32)
    windows = TokenWindows(*(x.contiguous().to(device) for x in (codes - reach[0], codes + 1 + reach[1], codes)))
    gathered = _gathered(site, qb)
    return [
        ("without a remainder", lists, {}),
        ("with a pooled remainder", lists, {"pooled": pooled}),
        ("with a remainder and an order", lists, {"pooled": pooled, "order": order}),
        ("with windows", lists_from_levels(levels * 255, block_q, block_k), {"windows": windows}),
        ("with gathered keys", lists, {"gathered": gathered, "pooled": pooled, "order": order}),
    ]


def _gathered(site: _Site, qb: int) -> GatheredKeys:
    """Every third group for each row, another third for each; the last group is ragged, one key is hidden."""
    extra = 9 * _GROUP + 3
    groups = -(-extra // _GROUP)
    mask = (torch.arange(qb)[:, None] + torch.arange(groups)) % 3 == 0
    bias = torch.randn(1, 2, extra, generator=site.gen)
    bias[..., 1] = -torch.inf
    k, v = site.draw(extra), site.draw(extra)
    rows = gathered_from_mask(torch.stack([mask, mask.flip(1)])[None].to(site.device))
    return GatheredKeys(k, v, bias.to(site.device), *rows, group=_GROUP)


def _double(extra: Pooled | GatheredKeys | None) -> Pooled | GatheredKeys | None:
    return extra and replace(extra, k=extra.k.double(), v=extra.v.double())


def _differ(got: Tensor, want: Tensor) -> float:
    return cast("float", (got.float() - want.float()).abs().max().item())
