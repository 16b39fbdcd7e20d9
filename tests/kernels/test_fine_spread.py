"""Expected errors of blocks with the mass of means of a few tokens, against loops over blocks in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dit_accel_kernels.fine_spread import fine_spread_scores
from dit_accel_kernels.types import TokenOrder
from tests.kernels.interpreter import repair

BACKENDS = [
    "reference",
    pytest.param("triton-cpu", marks=pytest.mark.interpreter),
    pytest.param("triton-cuda", marks=pytest.mark.gpu),
]


def runs_of(x: Tensor, seen: Tensor, run: int) -> tuple[Tensor, Tensor]:
    """Means of runs of seen tokens, ``[N, D]``, and how many there are, ``[N]``."""
    parts = [part[mine] for part, mine in zip(x.split(run), seen.split(run), strict=True)]
    means = [part.mean(0) if len(part) else x.new_zeros(x.shape[1]) for part in parts]
    return torch.stack(means), torch.tensor([float(len(part)) for part in parts], dtype=torch.float64)


def one_head(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, run: int, block_q: int, block_k: int, scale: float
) -> Tensor:
    """The formula for one head in block order, written block by block."""
    fine_q, size_q = runs_of(q, torch.ones(len(q), dtype=torch.bool), run)
    fine_k, size_k = runs_of(k, seen, run)
    weights = ((fine_q @ fine_k.T) * scale + size_k.log()).softmax(1) * size_q[:, None]
    kept = [mine.nonzero().flatten() + i * block_k for i, mine in enumerate(seen.split(block_k))]
    found = torch.zeros(-(-len(q) // block_q), len(kept), dtype=torch.float64)
    for i, a in enumerate(q.split(block_q)):
        rows = weights[i * block_q // run : (i + 1) * block_q // run]
        mass = torch.stack([part.sum() for part in rows.split(block_k // run, 1)]) / rows.sum()
        output = sum(m * v[at].mean(0) for m, at in zip(mass, kept, strict=True) if len(at))
        for j, at in enumerate(kept):
            if len(at):
                joint = (a.var(0, correction=0) * k[at].var(0, correction=0)).sum()
                distance = (v[at] - output).square().sum(1).mean()
                found[i, j] = mass[j] * scale * joint.sqrt() * distance.sqrt()
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "tokens", "dim", "blocks", "run", "masked", "ordered"),
    [
        pytest.param(torch.bfloat16, (300, 300), 128, (64, 64), 8, False, True, id="bf16-d128"),
        pytest.param(torch.bfloat16, (63, 1100), 64, (64, 32), 4, False, False, id="bf16-one-block"),
        pytest.param(torch.float16, (270, 333), 72, (32, 64), 8, True, True, id="fp16-d72-masked"),
        pytest.param(torch.bfloat16, (150, 90), 96, (16, 16), 1, True, True, id="bf16-single-tokens"),
    ],
)
def test_equals_the_oracle(
    backend: str,
    dtype: torch.dtype,
    tokens: tuple[int, int],
    dim: int,
    blocks: tuple[int, int],
    run: int,
    masked: bool,
    ordered: bool,
) -> None:
    repair()
    name, _, device = backend.partition("-")
    device = device or "cpu"
    torch.manual_seed(tokens[1])
    q, k, v = (((n % 3) + torch.randn(2, n, 2, dim)).to(dtype).transpose(1, 2) for n in (*tokens, tokens[1]))
    valid = torch.rand(2, tokens[1]) > 0.3 if masked else torch.ones(2, tokens[1], dtype=torch.bool)
    heads = torch.tensor([1, 0])
    tables = [torch.stack([torch.randperm(n) if ordered else torch.arange(n) for _ in range(2)]) for n in tokens]
    if masked:  # a block without a valid key, wherever its tokens are
        valid[1, tables[1][heads[0], : blocks[1]]] = False
    scale = dim**-0.5
    right = torch.stack(
        [
            torch.stack(
                [
                    one_head(
                        q[b, h, tables[0][heads[h]]].double(),
                        *(x[b, h, tables[1][heads[h]]].double() for x in (k, v)),
                        valid[b, tables[1][heads[h]]],
                        run,
                        *blocks,
                        scale,
                    )
                    for h in range(2)
                ]
            )
            for b in range(2)
        ]
    )
    if masked:  # what an invalid token holds must not matter
        k, v = (x.masked_fill(~valid[:, None, :, None], float("nan")) for x in (k, v))
    orders = [TokenOrder(table.int().to(device), heads.int().to(device)) if ordered else None for table in tables]
    got = fine_spread_scores(
        *(x.to(device) for x in (q, k, v)),
        tokens=run,
        block_q=blocks[0],
        block_k=blocks[1],
        scale=scale,
        order=orders[0],
        key_order=orders[1],
        key_valid=valid.to(device) if masked else None,
        backend=name,
    )
    assert got.dtype == torch.float32
    got = got.double().cpu()
    # Triton multiplies means as 16-bit numbers and sums products of variances in bfloat16.
    allowed = 1e-4 if name == "reference" else 2e-2
    assert float((got - right).norm() / right.norm()) < allowed
    assert torch.equal(got == 0, right == 0)


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("which", [0, 1])
def test_queries_or_keys_alone_have_an_order(backend: str, which: int) -> None:
    repair()
    device = backend.partition("-")[2]
    q, k, v = (torch.randn(1, 2, 150, 64, dtype=torch.bfloat16, device=device) for _ in range(3))
    order = TokenOrder(torch.randperm(150).int()[None].to(device), torch.zeros(2, dtype=torch.int32, device=device))
    settings = {"tokens": 8, "block_q": 32, "block_k": 32, "scale": 0.125, ("order", "key_order")[which]: order}
    found, right = (fine_spread_scores(q, k, v, **settings, backend=name) for name in ("triton", "reference"))  # type: ignore[arg-type]
    assert float((found - right).norm() / right.norm()) < 2e-2


@pytest.mark.interpreter
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_not_finite_is_seen(which: int) -> None:
    repair()
    inputs = [torch.randn(1, 1, 100, 64, dtype=torch.bfloat16) for _ in range(3)]
    inputs[which][0, 0, 40, 3] = float("nan")
    settings = {"tokens": 8, "block_q": 32, "block_k": 32, "scale": 0.125}
    for name in ("reference", "triton"):
        found = fine_spread_scores(*inputs, **settings, backend=name)  # type: ignore[arg-type]
        assert not bool(torch.isfinite(found[0, 0, 1]).all()), name


def test_fake_kernels_agree_with_real_ones() -> None:
    q, k, v = (torch.randn(1, 2, n, 16) for n in (70, 90, 90))
    table, head = torch.randperm(70).int()[None], torch.zeros(2, dtype=torch.int32)
    arguments = (q, k, v, 8, 32, 16, 0.25, [table, head, None, None], None, False)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.dit_accel_kernels.fine_spread_scores, arguments, test_utils=tests)


def test_messages_carry_value_and_expectation() -> None:
    q, k = torch.randn(1, 2, 70, 16), torch.randn(1, 2, 90, 16)
    settings = {"block_q": 32, "block_k": 32, "scale": 0.25}
    with pytest.raises(ValueError, match="tokens must divide both blocks, got tokens=3, block_q=32, block_k=32"):
        fine_spread_scores(q, k, k, tokens=3, **settings)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"key and value must be \(1, 2, 90, 16\), got \(1, 2, 90, 16\) and \(1, 2, 70"
    ):
        fine_spread_scores(q, k, q, tokens=8, **settings)  # type: ignore[arg-type]
    valid = torch.ones(1, 70, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"key_valid must be \(1, 90\), got \(1, 70\)"):
        fine_spread_scores(q, k, k, tokens=8, key_valid=valid, **settings)  # type: ignore[arg-type]
    order = TokenOrder(torch.arange(90, dtype=torch.int32)[None], torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match="order must hold 70 tokens and 2 heads, got 90 and 2"):
        fine_spread_scores(q, k, k, tokens=8, order=order, **settings)  # type: ignore[arg-type]
