"""The correction at mean queries against plain attention in float64, written from its definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dit_accel_kernels import block_stats, pack_bits
from dit_accel_kernels.query_means import add_query_means_, mean_query_residual
from dit_accel_kernels.types import Pooled, TokenOrder
from tests.kernels.interpreter import repair

BACKENDS = [
    "reference-cpu",
    pytest.param("triton-cpu", marks=pytest.mark.interpreter),
    pytest.param("triton-cuda", marks=pytest.mark.gpu),
]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def made(
    dtype: torch.dtype, tokens: int, dim: int, block_q: int, block_k: int, *, masked: bool, ordered: bool, share: float
) -> tuple[tuple[Tensor, Tensor, Tensor], Pooled, Tensor, Tensor | None, TokenOrder | None]:
    batch, heads = 2, 2
    torch.manual_seed(tokens + dim)
    shared = 2 * torch.randn(1, 1, heads, dim)  # lest mean queries be nearly 0
    query = (torch.randn(batch, tokens, heads, dim) + shared).to(dtype).transpose(1, 2)
    key, value = (torch.randn(batch, heads, tokens, dim).to(dtype) for _ in range(2))
    rows, cols = math.ceil(tokens / block_q), math.ceil(tokens / block_k)
    levels = (torch.rand(batch, heads, rows, cols) < share).to(torch.uint8)
    levels[..., 0] = 1
    valid = None
    if masked:
        valid = torch.rand(batch, tokens) > 0.3
        valid[:, :2] = True
    keys, count = (
        block_stats(key, block=block_k, key_valid=valid).mean,
        block_stats(key, block=block_k, key_valid=valid),
    )
    pooled = Pooled(
        keys,
        block_stats(value, block=block_k, key_valid=valid).mean,
        count.count.float().log()[:, None],
        pack_bits(levels),
    )
    if valid is not None:  # what padding holds must not matter
        key, value = (x.masked_fill(~valid[:, None, :, None], float("nan")) for x in (key, value))
    order = None
    if ordered:
        table = torch.stack([torch.randperm(tokens) for _ in range(3)]).int()
        order = TokenOrder(table, torch.tensor([2, 1], dtype=torch.int32))
    return (query, key, value), pooled, levels, valid, order


def oracle(
    tensors: tuple[Tensor, Tensor, Tensor],
    pooled: Pooled,
    levels: Tensor,
    valid: Tensor | None,
    order: TokenOrder | None,
    block_q: int,
    block_k: int,
    scale: float,
) -> Tensor:
    query, key, value = (x.double() for x in tensors)
    batch, heads, tokens, dim = query.shape
    found = torch.zeros(batch, heads, levels.shape[2], dim, dtype=torch.float64)
    bias = pooled.bias.double().expand(batch, -1, -1)
    for b in range(batch):
        kept = torch.arange(tokens) if valid is None else valid[b].nonzero()[:, 0]
        for h in range(heads):
            places = torch.arange(tokens) if order is None else order.table[order.head[h]].long()
            for i in range(levels.shape[2]):
                mean = query[b, h, places[i * block_q : (i + 1) * block_q]].mean(0)
                mean = mean.to(tensors[0].dtype).double()
                logits = key[b, h, kept] @ mean * scale
                dense = logits.softmax(0) @ value[b, h, kept]
                exact = levels[b, h, i, kept // block_k] == 1
                skipped = [j for j in range(levels.shape[3]) if not levels[b, h, i, j] and (kept // block_k == j).any()]
                more = pooled.k[b, h, skipped].double() @ mean * scale + bias[b, 0, skipped]
                weights = torch.cat([logits[exact], more]).softmax(0)
                sparse = weights @ torch.cat([value[b, h, kept][exact], pooled.v[b, h, skipped].double()])
                found[b, h, i] = dense - sparse
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "tokens", "dim", "blocks", "masked", "ordered"),
    [
        pytest.param(torch.float32, 150, 64, (64, 64), False, True, id="fp32"),
        pytest.param(torch.float16, 131, 72, (64, 128), False, False, id="fp16-d72-wide-keys"),
        pytest.param(torch.bfloat16, 150, 128, (128, 64), True, True, id="bf16-masked"),
        pytest.param(torch.float32, 70, 16, (16, 16), True, False, id="small-blocks"),
    ],
)
def test_residual_equals_the_oracle(
    backend: str, dtype: torch.dtype, tokens: int, dim: int, blocks: tuple[int, int], masked: bool, ordered: bool
) -> None:
    repair()
    name, device = backend.split("-")
    case = made(dtype, tokens, dim, *blocks, masked=masked, ordered=ordered, share=0.4)
    tensors, pooled, _, valid, order = case
    expected = oracle(*case, *blocks, dim**-0.5)
    got = mean_query_residual(
        *(x.to(device) for x in tensors),
        Pooled(*(x.to(device) for x in (pooled.k, pooled.v, pooled.bias, pooled.bits))),
        order=None if order is None else TokenOrder(order.table.to(device), order.head.to(device)),
        block_q=blocks[0],
        block_k=blocks[1],
        scale=dim**-0.5,
        key_valid=None if valid is None else valid.to(device),
        backend=name,
    )
    assert got.dtype == dtype
    torch.testing.assert_close(got.cpu().double(), expected, atol=TOLERANCE[dtype], rtol=0.02)
    assert expected.abs().max() > 0.05  # something to be wrong about


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_lacking_where_everything_is_exact(backend: str) -> None:
    repair()
    name, device = backend.split("-")
    (query, key, value), pooled, *_ = made(torch.float32, 100, 32, 32, 32, masked=False, ordered=False, share=1.1)
    got = mean_query_residual(
        query.to(device),
        key.to(device),
        value.to(device),
        Pooled(*(x.to(device) for x in (pooled.k, pooled.v, pooled.bias, pooled.bits))),
        block_q=32,
        block_k=32,
        scale=0.2,
        backend=name,
    )
    torch.testing.assert_close(got.cpu(), torch.zeros_like(got.cpu()), atol=1e-6, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ordered", [False, True])
def test_rows_are_added_to_their_tokens_and_to_no_others(backend: str, ordered: bool) -> None:
    repair()
    name, device = backend.split("-")
    tokens, block = 75, 32
    out = torch.randn(2, tokens, 2, 24).transpose(1, 2)
    rows = torch.randn(2, 2, 3, 24)
    table = torch.stack([torch.randperm(tokens) for _ in range(2)]).int()
    order = TokenOrder(table.to(device), torch.tensor([1, 0], dtype=torch.int32, device=device)) if ordered else None
    expected = out.clone()
    for h, row in enumerate((1, 0)):
        for i in range(tokens):
            token = int(table[row, i]) if ordered else i
            expected[:, h, token] += rows[:, h, i // block]
    given = out.to(device)
    got = add_query_means_(given, rows.to(device), order=order, block_q=block, backend=name)
    assert got is given
    torch.testing.assert_close(got.cpu(), expected, atol=1e-6, rtol=1e-6)


def test_a_query_that_is_not_a_number_stays_its_own() -> None:
    (query, key, value), pooled, *_ = made(torch.float32, 100, 32, 32, 32, masked=False, ordered=False, share=0.3)
    query[0, 0, 40] = float("nan")
    got = mean_query_residual(query, key, value, pooled, block_q=32, block_k=32, scale=0.2)
    assert torch.isfinite(got).all()
    assert torch.equal(got[0, 0, 1], torch.zeros(32))
    assert got[0, 0, 0].abs().max() > 0


def test_shapes_that_do_not_fit_are_named() -> None:
    (query, key, value), pooled, *_ = made(torch.float32, 100, 32, 32, 32, masked=False, ordered=False, share=0.3)
    with pytest.raises(ValueError, match=r"bits must be \[B, H, 2, 1\]"):
        mean_query_residual(query, key, value, pooled, block_q=64, block_k=32, scale=0.2)
    with pytest.raises(ValueError, match=r"pooled keys must be"):
        mean_query_residual(query, key[:, :, :64], value[:, :, :64], pooled, block_q=32, block_k=32, scale=0.2)
    with pytest.raises(ValueError, match="rows must be"):
        add_query_means_(query, torch.zeros(2, 2, 3, 32), block_q=32)


def test_compiles_without_a_graph_break() -> None:
    (query, key, value), pooled, *_ = made(torch.float32, 100, 32, 32, 32, masked=False, ordered=False, share=0.3)

    def call(query: Tensor) -> Tensor:
        rows = mean_query_residual(query, key, value, pooled, block_q=32, block_k=32, scale=0.2)
        return add_query_means_(query * 2, rows, block_q=32)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query), call(query))
