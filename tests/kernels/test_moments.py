"""Block moments against loops over blocks in float64."""

from __future__ import annotations

import pytest
import torch

from dit_accel_kernels.stats.moments import block_moments
from dit_accel_kernels.types import TokenOrder
from tests.kernels.interpreter import repair

BACKENDS = [
    "reference",
    "cpu",
    pytest.param("triton-cpu", marks=pytest.mark.interpreter),
    pytest.param("triton-cuda", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "tokens", "dim", "block", "masked", "ordered", "some"),
    [
        pytest.param(torch.float32, 111, 72, 64, True, True, False, id="fp32-d72"),
        pytest.param(torch.bfloat16, 300, 128, 128, False, True, True, id="bf16-d128-some"),
        pytest.param(torch.float16, 63, 96, 128, True, False, False, id="fp16-one-block"),
        pytest.param(torch.float32, 500, 80, 200, True, False, True, id="more-than-a-tile"),
    ],
)
def test_equals_the_oracle(
    backend: str, dtype: torch.dtype, tokens: int, dim: int, block: int, masked: bool, ordered: bool, some: bool
) -> None:
    repair()
    name, _, device = backend.partition("-")
    torch.manual_seed(tokens)
    x = (3 + torch.randn(2, tokens, 3, dim)).to(dtype).transpose(1, 2)
    valid = torch.rand(2, tokens) > 0.3 if masked else torch.ones(2, tokens, dtype=torch.bool)
    if masked:
        valid[1, :block] = False
    table = torch.stack([torch.randperm(tokens) for _ in range(2)])
    head = torch.tensor([1, 0, 1])
    count = -(-tokens // block)
    rows = torch.tensor([count - 1, 0]) if some else torch.arange(count)
    mean, variance = (torch.zeros(2, 3, rows.shape[0], dim, dtype=torch.float64) for _ in range(2))
    size = torch.zeros(2, rows.shape[0])
    given = x.clone()
    for b in range(2):
        for h in range(3):
            order = table[head[h]] if ordered else torch.arange(tokens)
            if masked:  # what an invalid token holds must not matter
                given[b, h, order[~valid[b]]] = float("nan")
            for i, row in enumerate(rows.tolist()):
                places = torch.arange(row * block, min((row + 1) * block, tokens))
                kept = x[b, h, order[places[valid[b, places]]]].double()
                size[b, i] = kept.shape[0]
                if kept.shape[0]:
                    mean[b, h, i], variance[b, h, i] = kept.mean(0), kept.var(0, correction=0)
    device = device or "cpu"
    got = block_moments(
        given.to(device),
        block=block,
        order=TokenOrder(table.int().to(device), head.int().to(device)) if ordered else None,
        rows=rows.to(device) if some else None,
        key_valid=valid.to(device) if masked else None,
        backend=name,
    )
    torch.testing.assert_close(got.mean.cpu().double(), mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.variance.cpu().double(), variance, atol=1e-5, rtol=1e-5)
    assert torch.equal(got.size.cpu(), size if masked else size[:1])
    assert variance.max() > 0.1


def test_shapes_that_do_not_fit_are_named() -> None:
    x = torch.zeros(1, 2, 10, 8)
    with pytest.raises(ValueError, match="order must hold 10 tokens and 2 heads"):
        block_moments(x, block=4, order=TokenOrder(torch.zeros(1, 9).int(), torch.zeros(2).int()))
    with pytest.raises(ValueError, match="key_valid must be"):
        block_moments(x, block=4, key_valid=torch.ones(1, 9, dtype=torch.bool))
    with pytest.raises(ValueError, match="at least one token"):
        block_moments(x, block=0)


def test_compiles_without_a_graph_break() -> None:
    x = torch.randn(1, 2, 50, 16)
    compiled = torch.compile(lambda x: block_moments(x * 2, block=16), fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(x), block_moments(x * 2, block=16), strict=True):
        torch.testing.assert_close(got, want)
