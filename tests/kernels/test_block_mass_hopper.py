"""The block mass of the Hopper kernel, part of whose exponentials are polynomials, against a float64 oracle."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dit_accel_kernels import TokenOrder, block_mass
from dit_accel_kernels.block_mass.hopper_launch import why_not_hopper
from tests.kernels.test_block_mass import inputs, make_order

pytestmark = pytest.mark.gpu

# The bar of the project is 1e-3; the polynomial is within 1e-4 of an exponential, the logits are those of 16-bit inputs.
RELATIVE = 2e-4


@pytest.fixture(autouse=True)
def _on_hopper() -> None:
    x = torch.empty(1, 1, 8, 64, dtype=torch.bfloat16, device="cuda")
    if (reason := why_not_hopper(x, x, 64, 64)) is not None:
        pytest.skip(reason)


def oracle(
    q: Tensor, k: Tensor, lse: Tensor, block_q: int, block_k: int, order: TokenOrder | None, valid: Tensor | None
) -> Tensor:
    """Mass of every block, float64, rows without a finite log-sum-exp left out of the means."""
    logits = q.double() @ k.double().transpose(2, 3) * q.shape[3] ** -0.5
    counted = lse > float("-inf")
    p = torch.exp(logits - lse.double().masked_fill(~counted, 0)[..., None])
    p = torch.where(counted[..., None], p, 0.0)
    if valid is not None:
        p = torch.where(valid[:, None, None], p, 0.0)
    if order is not None:
        p, counted = (
            torch.stack([x[:, h, order.table[order.head[h]].long()] for h in range(q.shape[1])], 1)
            for x in (p, counted)
        )
    rows = []
    for row, count in zip(p.split(block_q, 2), counted.split(block_q, 2), strict=True):
        each = count.sum(2).clamp(min=1)
        rows.append(torch.stack([part.sum((2, 3)) / each for part in row.split(block_k, 3)], -1))
    return torch.stack(rows, 2)


def exact_lse(q: Tensor, k: Tensor, valid: Tensor | None = None) -> Tensor:
    logits = q.double() @ k.double().transpose(2, 3) * q.shape[3] ** -0.5
    if valid is not None:
        logits = logits.masked_fill(~valid[:, None, None], float("-inf"))
    return logits.logsumexp(-1).float()


def agree(found: Tensor, expected: Tensor, relative: float = RELATIVE) -> None:
    """Every entry that is not negligible is right to ``relative``."""
    torch.testing.assert_close(found.double(), expected, rtol=relative, atol=1e-7 * float(expected.max()))


@pytest.mark.parametrize("loud", [1.0, 5.0, 30.0])
@pytest.mark.parametrize(
    ("dtype", "batch", "heads", "queries", "keys", "dim", "blocks", "features"),
    [
        pytest.param(torch.bfloat16, 1, 3, 1000, 1300, 64, (128, 64), "", id="d64-128x64"),
        pytest.param(torch.bfloat16, 2, 2, 700, 1280, 128, (128, 128), "", id="d128-128x128-whole"),
        pytest.param(torch.float16, 1, 2, 900, 777, 64, (64, 64), "order", id="fp16-d64-64x64-order"),
        pytest.param(torch.bfloat16, 2, 2, 600, 650, 96, (32, 128), "valid", id="d96-32x128-valid"),
        pytest.param(torch.bfloat16, 1, 2, 515, 4000, 72, (16, 64), "order+valid", id="d72-16x64-order-valid"),
    ],
)
def test_equals_the_oracle(
    dtype: torch.dtype,
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    dim: int,
    blocks: tuple[int, int],
    features: str,
    loud: float,
) -> None:
    torch.manual_seed(keys)
    q, k = inputs(dtype, batch, heads, queries, keys, dim, "cuda")
    q = q * loud
    order = make_order(heads, queries, "cuda") if "order" in features else None
    valid = torch.rand(batch, keys, device="cuda") > 0.3 if "valid" in features else None
    lse = exact_lse(q, k, valid)
    expected = oracle(q, k, lse, *blocks, order, valid)
    if valid is not None:
        k = k.masked_fill(~valid[:, None, :, None], float("nan"))
    options = {"block_q": blocks[0], "block_k": blocks[1], "order": order, "key_valid": valid}
    found = block_mass(q, k, lse, backend="hopper", **options)  # type: ignore[arg-type]
    agree(found, expected)
    # The same bits each time.
    assert torch.equal(found, block_mass(q, k, lse, backend="hopper", **options))  # type: ignore[arg-type]


def test_some_queries_of_some_blocks() -> None:
    q, k = inputs(torch.bfloat16, 1, 2, 2000, 900, 64, "cuda")
    lse = exact_lse(q, k)
    rows = torch.tensor([14, 3, 15], device="cuda", dtype=torch.int32)
    found = block_mass(q, k, lse, block_q=128, block_k=64, rows=rows, sample=16, backend="hopper")
    some = block_mass(q, k, lse, block_q=128, block_k=64, rows=rows, sample=16, backend="reference")
    agree(found, some.double())


def test_one_key_has_nearly_all_the_mass() -> None:
    """Wherever it lies, and so whichever way its exponential is taken."""
    for dim in (64, 128):
        k = torch.zeros(1, 2, 320, dim, device="cuda", dtype=torch.bfloat16)
        q = torch.randn(1, 2, 320, dim, device="cuda").sign().to(torch.bfloat16)
        k[0, :, torch.arange(320), torch.arange(320) % dim] = 4.0 * dim**0.5
        k[0, :, :, 0] += q[0, :, :, 0]
        lse = exact_lse(q, k)
        agree(block_mass(q, k, lse, block_q=16, block_k=64, backend="hopper"), oracle(q, k, lse, 16, 64, None, None))


@pytest.mark.parametrize("off", [-80.0, -20.0, 20.0, 60.0])
def test_a_normaliser_from_elsewhere(off: float) -> None:
    """Weights far above and far below 1 follow the formula as far as float32 goes."""
    q, k = inputs(torch.bfloat16, 1, 2, 256, 512, 64, "cuda")
    lse = exact_lse(q, k) + off
    found = block_mass(q, k, lse, block_q=64, block_k=64, backend="hopper")
    agree(found, oracle(q, k, lse, 64, 64, None, None))


@pytest.mark.parametrize(("off", "expected"), [(-120.0, float("inf")), (-1000.0, float("inf")), (150.0, 0.0)])
def test_weights_beyond_float32(off: float, expected: float) -> None:
    q, k = inputs(torch.bfloat16, 1, 2, 256, 512, 64, "cuda")
    lse = exact_lse(q, k) + off
    assert bool((block_mass(q, k, lse, block_q=64, block_k=64, backend="hopper") == expected).all())


def test_rows_without_a_normaliser_are_left_out() -> None:
    q, k = inputs(torch.bfloat16, 1, 2, 512, 640, 64, "cuda")
    lse = exact_lse(q, k)
    lse[:, :, 100:300] = float("-inf")
    lse[:, 1, 384:] = float("nan")
    found = block_mass(q, k, lse, block_q=128, block_k=64, backend="hopper")
    agree(found, oracle(q, k, lse, 128, 64, None, None))
    assert not bool(found[:, 1, 3].any())


@pytest.mark.parametrize("dim", [64, 128])
def test_what_is_not_a_number_is_seen(dim: int) -> None:
    """A key is seen in its block whichever of its exponentials are polynomials, a query in its row."""
    q, k = inputs(torch.bfloat16, 1, 1, 256, 512, dim, "cuda")
    lse = exact_lse(q, k)
    for i in range(0, 512, 7):
        poor = k.clone()
        poor[0, 0, i, i % dim] = float("nan")
        found = block_mass(q, poor, lse, block_q=64, block_k=64, backend="hopper")[0, 0]
        assert bool(found[:, i // 64].isnan().all()), i
        assert int(found.isnan().sum()) == 4, i
    for i in range(0, 256, 7):
        poor = q.clone()
        poor[0, 0, i, i % dim] = float("nan")
        found = block_mass(poor, k, lse, block_q=64, block_k=64, backend="hopper")[0, 0]
        assert bool(found[i // 64].isnan().all()), i
        assert int(found.isnan().sum()) == 8, i
