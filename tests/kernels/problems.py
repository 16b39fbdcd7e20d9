"""Problems for block-sparse attention, and a float64 oracle that knows nothing of lists, bits or blocks but the masks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from dit_accel_kernels.lists import gathered_from_mask, lists_from_levels, pack_bits
from dit_accel_kernels.types import BlockLists, GatheredKeys, Pooled, TokenOrder, TokenWindows
from tests.kernels.interpreter import repair

repair()

# Largest difference to float64, for outputs of about unit size. float32: some hundred roundings of 2**-24 in sums of up to
# 500 terms, 3xTF32 on a GPU included. float16 and bfloat16: the weights and the output are rounded once each (2**-11 and
# 2**-8 of values up to 4). The log-sum-exp is float32 throughout, but torch's CPU kernel takes a coarser exponential
# (2**-12) for the 16-bit types.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
LSE_TOLERANCE = {torch.float64: 2e-6, torch.float32: 2e-5, torch.float16: 3e-4, torch.bfloat16: 3e-4}

RUNNERS = [
    pytest.param(("reference", "cpu"), id="reference"),
    pytest.param(("cpu", "cpu"), id="cpu"),
    pytest.param(("triton", "cpu"), id="interpreter", marks=pytest.mark.interpreter),
    pytest.param(("triton", "cuda"), id="gpu", marks=pytest.mark.gpu),
]


@dataclass(frozen=True)
class Case:
    name: str
    sq: int = 111
    sk: int = 111
    dim: int = 64
    block_q: int = 64
    block_k: int = 64
    batch: int = 1
    heads: int = 2
    dtype: torch.dtype = torch.float32
    density: float = 0.5
    list_shape: tuple[int, int] = (1, 2)
    order: bool = False
    pooled: bool = False
    windows: bool = False
    valid: bool = False
    group: int = 0  # of gathered keys, 0 for none
    extra: int = 75  # gathered keys there are
    gather_density: float = 0.4
    seed: int = 0

    def __str__(self) -> str:
        return self.name


@dataclass
class Problem:
    """Inputs, and what they mean in masks: ``levels`` of blocks and ``mask`` of gathered groups, on the CPU."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    levels: torch.Tensor
    lists: BlockLists
    order: TokenOrder | None
    pooled: Pooled | None
    windows: TokenWindows | None
    key_valid: torch.Tensor | None
    gathered: GatheredKeys | None = None
    mask: torch.Tensor | None = None

    def extras(self) -> dict[str, object]:
        given = {"order": self.order, "pooled": self.pooled, "windows": self.windows, "key_valid": self.key_valid}
        return given | {"gathered": self.gathered}


def make(case: Case, device: str) -> Problem:
    gen = torch.Generator().manual_seed(case.seed)

    def view(tokens: int) -> torch.Tensor:
        """[B, H, S, D] as models hand it over: a view of [B, S, H, D]."""
        x = torch.randn(case.batch, tokens, case.heads, case.dim, generator=gen)
        return x.to(device, case.dtype).transpose(1, 2)

    q, k, v = view(case.sq), view(case.sk), view(case.sk)
    qb, kb = -(-case.sq // case.block_q), -(-case.sk // case.block_k)
    levels = (torch.rand(*case.list_shape, qb, kb, generator=gen) < case.density).to(torch.uint8)
    order = pooled = windows = key_valid = None
    if case.windows:
        levels = torch.where((torch.rand(levels.shape, generator=gen) < 0.5) & (levels != 0), 255, levels).byte()

        def code(low: int, high: int, n: int) -> torch.Tensor:
            return torch.randint(low, high, (3, n), generator=gen, dtype=torch.int32).to(device)

        windows = TokenWindows(code(-1, 4, case.sq), code(4, 9, case.sq), code(-1, 8, case.sk))
    if case.order:
        table = torch.stack([torch.randperm(case.sq, generator=gen) for _ in range(3)]).int().to(device)
        order = TokenOrder(table, torch.randint(0, 3, (case.heads,), generator=gen).int().to(device))
    if case.pooled:
        means = [torch.randn(case.batch, case.heads, kb, case.dim, generator=gen).to(device, case.dtype) for _ in "kv"]
        bias = torch.randn(case.batch, 1, kb, generator=gen)
        bias[..., kb // 2] = -torch.inf
        pooled = Pooled(*means, bias.to(device), pack_bits(levels).to(device))
    if case.valid:
        key_valid = (torch.rand(case.batch, case.sk, generator=gen) < 0.8).to(device)
    lists = lists_from_levels(levels.to(device), case.block_q, case.block_k)
    if not case.windows:
        lists = replace(lists, partial=None)
    p = Problem(q, k, v, levels, lists, order, pooled, windows, key_valid)
    if case.group:
        shape = (*case.list_shape, qb, -(-case.extra // case.group))
        p.mask = torch.rand(shape, generator=gen) < case.gather_density
        bias = torch.randn(*case.list_shape, case.extra, generator=gen)
        bias[..., :: case.group + 3] = -torch.inf
        p.gathered = gather(p.mask, view(case.extra), view(case.extra), bias.to(device), case.group)
    return p


def gather(
    mask: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, group: int, **capacity: int
) -> GatheredKeys:
    """Gathered keys of a mask, which may lie on another device."""
    return GatheredKeys(k, v, bias, *gathered_from_mask(mask.to(k.device), **capacity), group)


def oracle(p: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense float64 attention under an explicit token mask, on the CPU."""
    q, k, v = (x.detach().cpu().double() for x in (p.q, p.k, p.v))
    (batch, heads, sq, dim), sk = q.shape, k.shape[2]
    place = torch.arange(sq).expand(heads, sq)
    if p.order is not None:
        place = p.order.table.cpu()[p.order.head.cpu().long()].long().argsort(-1)  # natural -> block order
    key = torch.arange(sk)
    level = p.levels.expand(batch, heads, -1, -1)
    seen = torch.empty(batch, heads, sq, sk, dtype=torch.bool)
    extra = torch.full((batch, heads, sq, 0), -torch.inf, dtype=torch.float64)
    for h in range(heads):
        row = place[h]
        cell = level[:, h][:, row // p.lists.block_q][..., key // p.lists.block_k]
        seen[:, h] = cell != 0
        if p.windows is not None:
            lo, hi, code = (x.cpu() for x in (p.windows.q_lo, p.windows.q_hi, p.windows.k_code))
            inside = (lo[:, row, None] <= code[:, None]) & (code[:, None] < hi[:, row, None])
            seen[:, h] &= (cell == 1) | inside.all(0) | (code[0] < 0)
    if p.key_valid is not None:
        seen &= p.key_valid.cpu()[:, None, None]
    logits = (q @ k.mT * dim**-0.5).masked_fill(~seen, -torch.inf)
    if p.pooled is not None:
        bias = p.pooled.bias.cpu().double()[:, :, None]
        extra = q @ p.pooled.k.cpu().double().mT * dim**-0.5 + bias
        row = place[None, :, :, None] // p.lists.block_q
        extra = extra.masked_fill(level.gather(2, row.expand(batch, -1, -1, extra.shape[-1])) != 0, -torch.inf)
        v = torch.cat([v, p.pooled.v.cpu().double()], 2)
    logits = torch.cat([logits, extra], -1)
    if p.gathered is not None and p.mask is not None:
        g = p.gathered
        more = q @ g.k.cpu().double().mT * dim**-0.5 + g.bias.cpu().double()[:, :, None]
        sees = p.mask.repeat_interleave(g.group, -1)[..., : g.k.shape[2]] & (g.bias.cpu()[:, :, None] > -torch.inf)
        sees = sees.expand(batch, heads, -1, -1)
        rows = (place // p.lists.block_q)[None, :, :, None].expand(batch, -1, -1, more.shape[-1])
        logits = torch.cat([logits, more.masked_fill(~sees.gather(2, rows), -torch.inf)], -1)
        hidden = (g.bias.cpu() == -torch.inf)[..., None]
        v = torch.cat([v, g.v.cpu().double().masked_fill(hidden, 0)], 2)
    return logits.softmax(-1).nan_to_num(0) @ v, logits.logsumexp(-1)


def check(p: Problem, out: torch.Tensor, lse: torch.Tensor) -> None:
    want, want_lse = oracle(p)
    tolerance = TOLERANCE[p.q.dtype]
    torch.testing.assert_close(out.cpu().double(), want, atol=tolerance, rtol=tolerance)
    tolerance = LSE_TOLERANCE[p.q.dtype]
    torch.testing.assert_close(lse.cpu().double(), want_lse, atol=tolerance, rtol=tolerance)
    assert out.dtype == p.q.dtype
    assert out.stride() == p.q.stride()
    assert lse.dtype == torch.float32
