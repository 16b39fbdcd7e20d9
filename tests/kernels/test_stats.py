"""Block statistics against loops over blocks in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dit_accel_kernels import block_stats
from tests.kernels.interpreter import repair

BACKENDS = [
    "reference",
    "cpu",
    pytest.param("triton-cpu", marks=pytest.mark.interpreter),
    pytest.param("triton-cuda", marks=pytest.mark.gpu),
]
EPSILON = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def oracle(x: Tensor, block: int, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, tokens, dim = x.shape
    count = -(-tokens // block)
    mean = torch.zeros(batch, heads, count, dim, dtype=torch.float64)
    absmax = torch.zeros_like(mean)
    counts = torch.zeros(batch, count, dtype=torch.int32)
    for b in range(batch):
        for j in range(count):
            kept = x[b, :, j * block : (j + 1) * block][:, valid[b, j * block : (j + 1) * block]].double()
            counts[b, j] = kept.shape[1]
            if kept.shape[1]:
                mean[b, :, j], absmax[b, :, j] = kept.mean(1), kept.abs().amax(1)
    return mean, absmax, counts


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tokens", "dim", "block"),
    [
        pytest.param(torch.float32, 111, 72, 64, id="fp32-d72"),
        pytest.param(torch.bfloat16, 130, 128, 64, id="bf16-d128"),
        pytest.param(torch.float16, 63, 96, 128, id="fp16-one-block"),
        pytest.param(torch.bfloat16, 100, 64, 24, id="odd-block"),
    ],
)
def test_equals_the_oracle(backend: str, masked: bool, dtype: torch.dtype, tokens: int, dim: int, block: int) -> None:
    repair()
    name, _, device = backend.partition("-")
    x = torch.randn(2, tokens, 3, dim, dtype=dtype).transpose(1, 2)
    valid = torch.rand(2, tokens) > 0.3 if masked else torch.ones(2, tokens, dtype=torch.bool)
    if masked:
        valid[1, :block] = False
    mean, absmax, counts = oracle(x, block, valid)
    if masked:  # what an invalid token holds must not matter
        x = x.masked_fill(~valid[:, None, :, None], float("nan"))
    device = device or "cpu"
    got = block_stats(x.to(device), block=block, key_valid=valid.to(device) if masked else None, backend=name)
    assert got.mean.dtype == dtype
    assert got.absmax.dtype == torch.float32
    assert got.count.dtype == torch.int32
    assert got.count.shape[0] == (2 if masked else 1)
    torch.testing.assert_close(got.mean.double().cpu(), mean, atol=1e-6, rtol=EPSILON[dtype])
    torch.testing.assert_close(got.absmax.double().cpu(), absmax, atol=0, rtol=0)
    assert torch.equal(got.count.cpu().expand(2, -1), counts)


def test_fake_kernel_agrees_with_the_real_one() -> None:
    x = torch.randn(2, 50, 3, 8).transpose(1, 2)
    for valid in (None, torch.rand(2, 50) > 0.5):
        arguments = (x, 16, valid, False)
        op = torch.ops.dit_accel_kernels.block_stats
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_shape_errors_say_what_was_expected() -> None:
    x = torch.randn(2, 3, 50, 8)
    with pytest.raises(ValueError, match=r"key_valid must be \(2, 50\), got \(1, 50\)"):
        block_stats(x, block=16, key_valid=torch.ones(1, 50, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"x must be \[B, H, S, D\], got shape \(3, 50, 8\)"):
        block_stats(x[0], block=16)
