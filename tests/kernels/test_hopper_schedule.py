"""The order in which the Hopper kernel does its last query blocks."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tests.kernels.interpreter import repair


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("shape", "partial", "first"),
    [((2, 3), False, 300), ((1, 3), True, 1000), ((2, 1), True, 1500), ((1, 1), False, 1559)],
)
def test_last_jobs_come_longest_first(shape: tuple[int, int], partial: bool, first: int) -> None:
    repair()
    from dit_accel_kernels.block_sparse.hopper_schedule import BLOCK, OTHERS, longest_first_kernel

    batch, heads, qb = 2, 3, 260
    gen = torch.Generator().manual_seed(first)
    full, more = (torch.randint(0, 9, (*shape, qb), generator=gen, dtype=torch.int32) for _ in range(2))
    jobs = batch * heads * qb
    order = torch.full((jobs - first,), -1, dtype=torch.int32)
    counter = torch.full((1,), 7, dtype=torch.int32)
    strides = [s if n > 1 else 0 for n, s in zip(shape, full.stride()[:2])]
    longest_first_kernel[(-(-(jobs - first) // BLOCK),)](
        full, more if partial else None, order, counter, first, jobs, qb, heads, *strides,
        HAS_PARTIAL=partial, BLOCK=BLOCK, OTHERS=OTHERS,
    )  # fmt: skip
    length = (full + more if partial else full).expand(batch, heads, qb).flatten()
    want = length[first:].argsort(descending=True, stable=True) + first
    assert order.tolist() == want.tolist()
    assert counter.item() == 0
