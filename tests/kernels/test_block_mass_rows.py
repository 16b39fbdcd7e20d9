"""Rows of a block mass and their shifts, in one launch, against the same by tensor operations."""

from __future__ import annotations

import pytest
import torch

from dit_accel_kernels.block_mass.reference import query_rows
from tests.kernels.interpreter import repair

DEVICES = [pytest.param("cpu", marks=pytest.mark.interpreter), pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("block_q", "step", "chosen", "ordered"),
    [
        pytest.param(128, 1, None, False, id="all"),
        pytest.param(64, 1, None, True, id="order"),
        pytest.param(16, 8, [5, 0, 5, 10], True, id="sampled-rows-in-order"),
        pytest.param(32, 4, [10, 2], False, id="sampled-rows"),
    ],
)
def test_tokens_and_shifts(device: str, block_q: int, step: int, chosen: list[int] | None, ordered: bool) -> None:
    pytest.importorskip("triton")
    repair()
    from dit_accel_kernels.block_mass.hopper_schedule import mass_rows

    tokens, batch, heads = 1301, 2, 3
    lse = 20 * torch.randn(batch, heads, tokens)
    lse[0, 1, :700] = float("-inf")
    lse[1, 2, 5::7] = float("nan")
    lse[1, 0, 3] = float("inf")
    table = torch.stack([torch.randperm(tokens) for _ in range(2)]).int() if ordered else None
    head = torch.tensor([1, 0, 1], dtype=torch.int32) if ordered else None
    rows = None if chosen is None else torch.tensor(chosen, dtype=torch.int64 if ordered else torch.int32)
    there = torch.arange(-(-tokens // (block_q * step))) if rows is None else rows
    right, inside = query_rows(there, block_q, tokens, table, head, step)
    given = [None if x is None else x.to(device) for x in (rows, table, head)]
    token, shift = (x.cpu() for x in mass_rows(lse.to(device), block_q, *given, step))
    assert torch.equal(token[:, inside].long(), right[:, inside])
    assert int(token.min()) >= 0
    assert int(token.max()) < tokens
    for b in range(batch):
        for h in range(heads):
            mine = lse[b, h, right[h if ordered else 0]]
            counted = inside & (mine > float("-inf"))
            count = counted.view(-1, block_q).sum(1).clamp(min=1).repeat_interleave(block_q)
            expected = torch.where(counted, -mine.double() / torch.log(torch.tensor(2.0).double()) - count.log2(), 0)
            assert torch.equal(shift[b, h] == float("-inf"), ~counted | (mine == float("inf")))
            kept = counted & mine.isfinite()
            torch.testing.assert_close(shift[b, h][kept].double(), expected[kept], atol=1e-4, rtol=1e-6)
