"""Expected errors of blocks against loops over blocks in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dit_accel_kernels.spread import spread_scores
from dit_accel_kernels.types import TokenOrder
from tests.kernels.interpreter import repair

BACKENDS = [
    "reference",
    "cpu",
    pytest.param("triton-cpu", marks=pytest.mark.interpreter),
    pytest.param("triton-cuda", marks=pytest.mark.gpu),
]


def one_head(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, block_q: int, block_k: int, rows: list[int], scale: float
) -> Tensor:
    """The formula for one head in block order, written block by block."""
    found = torch.zeros(len(rows), -(-len(k) // block_k), dtype=torch.float64)
    kept = [mine.nonzero().flatten() + i * block_k for i, mine in enumerate(seen.split(block_k))]
    for i, row in enumerate(rows):
        a = q[row * block_q : (row + 1) * block_q]
        weights = [len(at) * math.exp(scale * float(a.mean(0) @ k[at].mean(0))) if len(at) else 0.0 for at in kept]
        output = sum(w / sum(weights) * v[at].mean(0) for w, at in zip(weights, kept, strict=True) if len(at))
        for j, at in enumerate(kept):
            if len(at):
                joint = float((a.var(0, correction=0) * k[at].var(0, correction=0)).sum())
                distance = float((v[at] - output).square().sum(1).mean())
                found[i, j] = weights[j] / sum(weights) * scale * math.sqrt(joint) * math.sqrt(distance)
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "tokens", "dim", "blocks", "masked", "how", "some"),
    [
        pytest.param(torch.float32, (190, 190), 72, (64, 32), True, "candidates", True, id="fp32-d72-candidates"),
        pytest.param(torch.bfloat16, (300, 300), 128, (128, 64), False, "candidates", True, id="bf16-d128-candidates"),
        pytest.param(torch.bfloat16, (300, 520), 128, (16, 16), False, "heads", False, id="bf16-d128-heads"),
        pytest.param(torch.float16, (63, 140), 96, (128, 64), True, "natural", False, id="fp16-one-block"),
        pytest.param(torch.float32, (500, 450), 160, (200, 100), True, "heads", False, id="more-than-a-tile"),
    ],
)
def test_equals_the_oracle(
    backend: str,
    dtype: torch.dtype,
    tokens: tuple[int, int],
    dim: int,
    blocks: tuple[int, int],
    masked: bool,
    how: str,
    some: bool,
) -> None:
    repair()
    name, _, device = backend.partition("-")
    torch.manual_seed(tokens[0])
    q, k, v = (((n % 3) + torch.randn(2, n, 2, dim)).to(dtype).transpose(1, 2) for n in (*tokens, tokens[1]))
    valid = torch.rand(2, tokens[1]) > 0.3 if masked else torch.ones(2, tokens[1], dtype=torch.bool)
    if masked:
        valid[1, : blocks[1]] = False
    table_q, table_k = (torch.stack([torch.randperm(n) for _ in range(2)]) for n in tokens)
    heads = torch.tensor([1, 0])
    count = -(-tokens[0] // blocks[0])
    rows = [count - 1, 0] if some else list(range(count))
    scale = dim**-0.5
    orders = [(0, 0), (1, 1)] if how == "candidates" else [tuple(heads.tolist())]
    if how == "candidates":
        table_k = table_q
    elif how == "natural":
        table_q, table_k = (torch.arange(n).expand(2, -1) for n in tokens)
    right = torch.stack(
        [
            torch.stack(
                [
                    torch.stack(
                        [
                            one_head(
                                q[b, h, table_q[at[h]]].double(),
                                *(x[b, h, table_k[at[h]]].double() for x in (k, v)),
                                valid[b, table_k[at[h]]],
                                *blocks,
                                rows,
                                scale,
                            )
                            for h in range(2)
                        ]
                    )
                    for b in range(2)
                ]
            )
            for at in orders
        ]
    )
    if masked:  # what an invalid token holds must not matter
        k, v = (x.masked_fill(~valid[:, None, :, None], float("nan")) for x in (k, v))
    device = device or "cpu"
    options = {}
    if how == "candidates":
        options["candidates"] = table_q.int().to(device)
    elif how == "heads":
        options["order"] = TokenOrder(table_q.int().to(device), heads.int().to(device))
        options["key_order"] = TokenOrder(table_k.int().to(device), heads.int().to(device))
    got = spread_scores(
        q.to(device),
        k.to(device),
        v.to(device),
        block_q=blocks[0],
        block_k=blocks[1],
        scale=scale,
        rows=torch.tensor(rows, device=device) if some else None,
        key_valid=valid.to(device) if masked else None,
        backend=name,
        **options,
    )
    assert got.dtype == torch.float32
    assert right.max() > 1e-3
    # Variances are rounded to bfloat16 by Triton, means are not.
    torch.testing.assert_close(got.cpu().double(), right, rtol=3e-3 if name == "triton" else 1e-4, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_common_offset_does_not_drown_what_differs(backend: str) -> None:
    """Distances of values from the output are small differences of large numbers where all values share an offset."""
    repair()
    name, _, device = backend.partition("-")
    torch.manual_seed(2)
    q, k, v = (torch.randn(1, 1, 256, 64, device=device or "cpu") for _ in range(3))
    options = {"block_q": 64, "block_k": 16, "scale": 0.125, "backend": name}
    torch.testing.assert_close(
        spread_scores(q, k, v + 20, **options), spread_scores(q, k, v, **options), rtol=5e-2, atol=1e-4
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", range(3))
def test_nan_is_seen(backend: str, which: int) -> None:
    repair()
    name, _, device = backend.partition("-")
    tensors = [torch.randn(1, 1, 64, 16, device=device or "cpu") for _ in range(3)]
    tensors[which][0, 0, 33, 5] = float("nan")
    found = spread_scores(*tensors, block_q=16, block_k=16, scale=0.25, backend=name)
    assert not found.isfinite().all()


def test_shapes_that_do_not_fit_are_named() -> None:
    x = torch.zeros(1, 2, 10, 8)
    order = TokenOrder(torch.zeros(1, 9).int(), torch.zeros(2).int())
    settings = {"block_q": 4, "block_k": 4, "scale": 1.0}
    with pytest.raises(ValueError, match="order must hold 10 tokens and 2 heads"):
        spread_scores(x, x, x, order=order, **settings)
    with pytest.raises(ValueError, match="key_valid must be"):
        spread_scores(x, x, x, key_valid=torch.ones(1, 9, dtype=torch.bool), **settings)
    with pytest.raises(ValueError, match="at least one token"):
        spread_scores(x, x, x, block_q=0, block_k=4, scale=1.0)
    with pytest.raises(ValueError, match="key and value must be"):
        spread_scores(x, x, x[:, :1], **settings)
    with pytest.raises(ValueError, match=r"candidates must be \[C, 10\]"):
        spread_scores(x, x, x, candidates=order.table, **settings)
    with pytest.raises(ValueError, match="order and key_order must be None"):
        spread_scores(x, x, x, candidates=torch.zeros(1, 10).int(), order=order, **settings)


def test_compiles_without_a_graph_break() -> None:
    x = torch.randn(1, 2, 50, 16)
    table = torch.stack([torch.arange(50), torch.randperm(50)]).int()

    def call(x: Tensor) -> Tensor:
        return spread_scores(x * 2, x, x, block_q=16, block_k=8, scale=0.25, candidates=table)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), call(x))
