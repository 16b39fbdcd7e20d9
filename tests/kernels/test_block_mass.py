"""Block mass and log-sum-exp against a float64 oracle that materialises everything."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dit_accel_kernels import TokenOrder, attention_lse, block_mass
from tests.kernels.interpreter import repair

BACKENDS = [
    "reference",
    "cpu",
    pytest.param("triton-cpu", marks=pytest.mark.interpreter),
    pytest.param("triton-cuda", marks=pytest.mark.gpu),
]
# The bar of the project for mass is 1e-3; float32 sums over a few hundred keys leave much less.
MASS_TOLERANCE = 2e-5
LSE_TOLERANCE = 1e-4


def place(backend: str) -> tuple[str, str]:
    """Backend name and device of a parameter such as ``triton-cuda``."""
    repair()
    name, _, device = backend.partition("-")
    return name, device or "cpu"


def inputs(dtype: torch.dtype, batch: int, heads: int, queries: int, keys: int, dim: int, device: str) -> list[Tensor]:
    """q and k as views of a ``[B, S, H, D]`` tensor."""
    return [torch.randn(batch, n, heads, dim, dtype=dtype, device=device).transpose(1, 2) for n in (queries, keys)]


def make_order(heads: int, tokens: int, device: str) -> TokenOrder:
    table = torch.stack([torch.randperm(tokens) for _ in range(2)]).int()
    return TokenOrder(table.to(device), (torch.arange(heads, dtype=torch.int32) % 2).to(device))


def oracle(
    q: Tensor,
    k: Tensor,
    block_q: int,
    block_k: int,
    order: TokenOrder | None = None,
    valid: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mass of every block and the log-sum-exp, float64, by loops over blocks."""
    logits = q.double() @ k.double().transpose(2, 3) * q.shape[3] ** -0.5
    if valid is not None:
        logits = logits.masked_fill(~valid[:, None, None], float("-inf"))
    exact = logits.logsumexp(-1)
    p = torch.exp(logits - (exact if lse is None else lse.double())[..., None]).nan_to_num(0.0)
    if order is not None:
        p = torch.stack([p[:, h, order.table[order.head[h]].long()] for h in range(q.shape[1])], 1)
    mass = [[part.sum(3).mean(2) for part in row.split(block_k, 3)] for row in p.split(block_q, 2)]
    return torch.stack([torch.stack(row, -1) for row in mass], 2), exact


CASES = [
    pytest.param(torch.float32, 1, 2, 90, 130, 64, 64, 64, id="fp32-d64"),
    pytest.param(torch.bfloat16, 2, 2, 150, 130, 72, 64, 64, id="bf16-d72"),
    pytest.param(torch.bfloat16, 1, 2, 130, 111, 96, 128, 64, id="bf16-d96"),
    pytest.param(torch.float16, 1, 2, 200, 200, 128, 64, 128, id="fp16-d128"),
    pytest.param(torch.bfloat16, 2, 1, 63, 65, 64, 48, 40, id="odd-blocks"),
    pytest.param(torch.bfloat16, 1, 2, 300, 100, 64, 160, 16, id="wide-query-block"),
    pytest.param(torch.bfloat16, 1, 1, 80, 70, 256, 64, 32, id="d256"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "batch", "heads", "queries", "keys", "dim", "block_q", "block_k"), CASES)
def test_equals_the_oracle(
    backend: str,
    dtype: torch.dtype,
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    dim: int,
    block_q: int,
    block_k: int,
) -> None:
    name, device = place(backend)
    q, k = inputs(dtype, batch, heads, queries, keys, dim, device)
    lse = attention_lse(q, k, backend=name)
    order = make_order(heads, queries, device)
    want, exact = oracle(q, k, block_q, block_k, order)
    torch.testing.assert_close(lse.double(), exact, atol=LSE_TOLERANCE, rtol=0)
    mass = block_mass(q, k, lse, block_q=block_q, block_k=block_k, order=order, backend=name)
    assert mass.dtype == torch.float32
    torch.testing.assert_close(mass.double(), want, atol=MASS_TOLERANCE, rtol=0)
    torch.testing.assert_close(mass.sum(-1), torch.ones_like(mass[..., 0]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ordered", [False, True])
def test_chosen_rows(backend: str, ordered: bool) -> None:
    name, device = place(backend)
    q, k = inputs(torch.bfloat16, 2, 2, 250, 100, 64, device)
    order = make_order(2, 250, device) if ordered else None
    rows = torch.tensor([3, 0, 3], dtype=torch.int32, device=device)
    want, exact = oracle(q, k, 64, 64, order)
    mass = block_mass(q, k, exact.float(), block_q=64, block_k=64, rows=rows, order=order, backend=name)
    assert mass.shape == (2, 2, 3, 2)
    torch.testing.assert_close(mass.double(), want[:, :, rows.long()], atol=MASS_TOLERANCE, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_invalid_keys_count_nothing_whatever_they_hold(backend: str) -> None:
    name, device = place(backend)
    q, k = inputs(torch.bfloat16, 3, 1, 100, 130, 64, device)
    valid = torch.rand(3, 130, device=device) > 0.3
    valid[1] = False
    valid[2, 64:] = False
    want, exact = oracle(q, k, 64, 64, valid=valid)
    k = k.masked_fill(~valid[:, None, :, None], float("nan"))
    lse = attention_lse(q, k, key_valid=valid, backend=name)
    torch.testing.assert_close(lse.double(), exact, atol=LSE_TOLERANCE, rtol=0)
    mass = block_mass(q, k, lse, block_q=64, block_k=64, key_valid=valid, backend=name)
    torch.testing.assert_close(mass.double(), want, atol=MASS_TOLERANCE, rtol=0)
    assert not mass[1].any()
    assert not mass[2, :, :, 1:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_normaliser_of_an_earlier_step(backend: str) -> None:
    """With another LSE the sums are no longer 1; the mass follows the formula."""
    name, device = place(backend)
    q, k = inputs(torch.float32, 1, 2, 70, 90, 64, device)
    cached = torch.randn(1, 2, 70, device=device) + 5
    want, _ = oracle(q, k, 64, 32, lse=cached)
    mass = block_mass(q, k, cached, block_q=64, block_k=32, backend=name)
    torch.testing.assert_close(mass.double(), want, atol=MASS_TOLERANCE, rtol=1e-4)


@pytest.mark.interpreter
@pytest.mark.parametrize("dim", [64, 72])
def test_descriptors_read_what_pointers_read(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hopper's loads, made by the interpreter: tails in tokens and in channels must read as zeros."""
    repair()
    from dit_accel_kernels.block_mass import launch

    q, k = inputs(torch.bfloat16, 2, 1, 70, 90, dim, "cpu")
    want, exact = oracle(q, k, 64, 64)
    monkeypatch.setattr(launch, "takes_tma", lambda _: True)
    lse = attention_lse(q, k, backend="triton")
    torch.testing.assert_close(lse.double(), exact, atol=LSE_TOLERANCE, rtol=0)
    mass = block_mass(q, k, lse, block_q=64, block_k=64, backend="triton")
    torch.testing.assert_close(mass.double(), want, atol=MASS_TOLERANCE, rtol=0)


def test_cached_normaliser_stays_within_the_bar() -> None:
    """One small denoising step later, the mass under the old LSE is within 1e-3 of the exact one."""
    q, k = inputs(torch.float32, 1, 2, 512, 512, 64, "cpu")
    old = attention_lse(q, k)
    q = q + 1e-3 * torch.randn_like(q)
    mass = block_mass(q, k, old, block_q=64, block_k=64)
    want, _ = oracle(q, k, 64, 64)
    torch.testing.assert_close(mass.double(), want, atol=1e-3, rtol=0)


def test_rows_without_a_normaliser_are_left_out_of_the_mean() -> None:
    q, k = inputs(torch.float32, 1, 1, 64, 64, 64, "cpu")
    lse = attention_lse(q, k)
    want = block_mass(q[:, :, :32], k, lse[:, :, :32], block_q=32, block_k=32)
    lse[:, :, 32:] = float("-inf")
    for name in ("reference", "cpu"):
        mass = block_mass(q, k, lse, block_q=64, block_k=32, backend=name)
        torch.testing.assert_close(mass, want)


def test_fake_kernels_agree_with_real_ones() -> None:
    q, k = inputs(torch.float32, 1, 2, 70, 50, 16, "cpu")
    lse = attention_lse(q, k)
    op = torch.ops.dit_accel_kernels
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(op.attention_lse, (q, k, 0.25, None, False), test_utils=tests)
    arguments = (q, k, lse, 32, 16, 0.25, None, None, None, None, False)
    torch.library.opcheck(op.block_mass, arguments, test_utils=tests)


def test_messages_carry_value_and_expectation() -> None:
    q, k = inputs(torch.float32, 1, 2, 70, 50, 16, "cpu")
    with pytest.raises(ValueError, match=r"lse must be \(1, 2, 70\), got \(1, 2, 50\)"):
        block_mass(q, k, torch.zeros(1, 2, 50), block_q=32, block_k=16)
    with pytest.raises(ValueError, match="backend must be 'triton', 'cpu', 'reference' or None, got 'fast'"):
        attention_lse(q, k, backend="fast")
    with pytest.raises(ValueError, match="agree in B, H and D"):
        attention_lse(q, k[..., :8])
