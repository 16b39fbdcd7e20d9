"""Token permutations: bit-exact, invertible, and their means equal those of the permuted tensor."""

from __future__ import annotations

import pytest
import torch

from dit_accel_kernels import (
    TokenOrder,
    block_stats,
    invert_order,
    permute_and_pool,
    permute_tokens,
    unpermute_tokens,
)
from tests.kernels.interpreter import repair

BACKENDS = [
    "reference",
    "cpu",
    pytest.param("triton-cpu", marks=pytest.mark.interpreter),
    pytest.param("triton-cuda", marks=pytest.mark.gpu),
]
CASES = [
    pytest.param(torch.float32, 111, 72, id="fp32-d72"),
    pytest.param(torch.bfloat16, 130, 128, id="bf16-d128"),
    pytest.param(torch.float16, 63, 96, id="fp16-d96"),
]


def make_order(tokens: int, device: str) -> TokenOrder:
    table = torch.stack([torch.randperm(tokens), torch.arange(tokens).flip(0)]).int()
    return TokenOrder(table.to(device), torch.tensor([1, 0, 1], dtype=torch.int32, device=device))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "tokens", "dim"), CASES)
def test_round_trip_is_bit_exact(backend: str, dtype: torch.dtype, tokens: int, dim: int) -> None:
    repair()
    name, _, device = backend.partition("-")
    order = make_order(tokens, device or "cpu")
    # A view into a fused projection: neither dense nor contiguous.
    x = torch.randn(2, tokens, 3, 3, dim, dtype=dtype, device=device or "cpu")[:, :, 1].transpose(1, 2)
    moved = permute_tokens(x, order, backend=name)
    assert moved.is_contiguous()
    for head in range(3):
        assert torch.equal(moved[:, head], x[:, head, order.table[order.head[head]].long()])
    assert torch.equal(unpermute_tokens(moved, order, backend=name), x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "tokens", "dim"), CASES)
def test_pool_equals_permute_then_stats(backend: str, masked: bool, dtype: torch.dtype, tokens: int, dim: int) -> None:
    repair()
    name, _, device = backend.partition("-")
    device = device or "cpu"
    order = make_order(tokens, device)
    k, v = (torch.randn(2, tokens, 3, dim, dtype=dtype, device=device).transpose(1, 2) for _ in range(2))
    valid = None
    if masked:
        valid = torch.rand(2, tokens, device=device) > 0.3
        valid[1, 64:] = False
    got = permute_and_pool(k, v, order, block=64, key_valid=valid, backend=name)
    for x, moved, mean in ((k, got.k, got.mean_k), (v, got.v, got.mean_v)):
        want = permute_tokens(x, order, backend="reference")
        assert torch.equal(moved, want)
        stats = block_stats(want, block=64, key_valid=valid, backend="reference")
        torch.testing.assert_close(mean, stats.mean, atol=1e-6, rtol=1e-6 if dtype == torch.float32 else 8e-3)
        assert torch.equal(got.count, stats.count)


def test_inverse_undoes_the_table() -> None:
    table = torch.stack([torch.randperm(97) for _ in range(3)]).int()
    inverse = invert_order(table)
    assert inverse.dtype == torch.int32
    assert torch.equal(inverse.gather(1, table.long()), torch.arange(97, dtype=torch.int32).expand(3, -1))


def test_order_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="order must hold 50 tokens and 3 heads, got 49 and 3"):
        permute_tokens(torch.randn(1, 3, 50, 8), make_order(49, "cpu"))


def test_fake_kernels_agree_with_real_ones() -> None:
    x = torch.randn(2, 50, 3, 8).transpose(1, 2)
    order = make_order(50, "cpu")
    tests = ("test_schema", "test_faketensor")
    op = torch.ops.dit_accel_kernels
    for inverse in (False, True):
        torch.library.opcheck(op.permute, (x, order.table, order.head, inverse, False), test_utils=tests)
    arguments = (x, x.clone(), order.table, order.head, 16, None, False)
    torch.library.opcheck(op.permute_and_pool, arguments, test_utils=tests)
