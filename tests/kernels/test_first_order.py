"""First-order terms against their definition in float64, block by block and key by key."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_accel_kernels import block_stats, pack_bits
from dit_accel_kernels.first_order import add_first_order_, launch
from dit_accel_kernels.query_means import mean_query_residual
from dit_accel_kernels.types import Pooled, TokenOrder
from tests.kernels.interpreter import repair

BACKENDS = [
    "reference-cpu",
    pytest.param("triton-cpu", marks=pytest.mark.interpreter),
    pytest.param("triton-cuda", marks=pytest.mark.gpu),
]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 4e-2}
Case = dict[str, Any]


def made(
    dtype: torch.dtype,
    tokens: int,
    dim: int,
    block_q: int,
    block_k: int,
    *,
    masked: bool,
    ordered: bool,
    cross: int = 0,
) -> Case:
    """Tensors of two batch elements and heads; keys vary slowly, so that mean keys differ."""
    batch, heads, keys = 2, 2, cross or tokens
    torch.manual_seed(tokens + dim)
    rows, cols = math.ceil(tokens / block_q), math.ceil(keys / block_k)
    query = (2 * torch.randn(batch, tokens, heads, dim)).to(dtype).transpose(1, 2)
    slow = torch.randn(batch, heads, cols, dim).repeat_interleave(block_k, 2)[:, :, :keys]
    key = (slow + torch.randn(batch, heads, keys, dim)).to(dtype)
    value = (slow + torch.randn(batch, heads, keys, dim)).to(dtype)
    levels = (torch.rand(batch, heads, rows, cols) < 0.4).to(torch.uint8)
    levels[..., 0] = 1
    valid = None
    if masked:
        valid = torch.rand(batch, keys) > 0.3
        valid[:, :2] = True
        valid[0, block_k : 2 * block_k] = False  # a block of which nothing is valid
    stats = [block_stats(x, block=block_k, key_valid=valid) for x in (key, value)]
    bias = stats[0].count.float().log()[:, None]
    if valid is not None:  # what padding holds must not matter
        key, value = (x.masked_fill(~valid[:, None, :, None], float("nan")) for x in (key, value))
    order = None
    if ordered:
        table = torch.stack([torch.randperm(tokens) for _ in range(3)]).int()
        order = TokenOrder(table, torch.tensor([2, 1], dtype=torch.int32))
    return {
        "out": torch.randn(batch, tokens, heads, dim).to(dtype).transpose(1, 2),
        "query": query,
        "lse": 1.0 + torch.rand(batch, heads, tokens) + dim**-0.5 * query.float().square().sum(-1).sqrt(),
        "key": key,
        "value": value,
        "pooled": Pooled(stats[0].mean, stats[1].mean, bias, pack_bits(levels)),
        "more": torch.randn(batch, tokens, heads, dim).to(dtype).transpose(1, 2) if ordered else None,
        "order": order,
        "block_q": block_q,
        "block_k": block_k,
        "scale": dim**-0.5,
        "key_valid": valid,
    }


def moved(case: Case, device: str) -> Case:
    """The case on a device, with an output of its own."""

    def to(x: Any) -> Any:
        if isinstance(x, Pooled):
            return Pooled(*(y.to(device) for y in (x.k, x.v, x.bias, x.bits)))
        if isinstance(x, TokenOrder):
            return TokenOrder(x.table.to(device), x.head.to(device))
        return x.to(device) if isinstance(x, Tensor) else x

    return {name: to(x) for name, x in case.items()} | {"out": case["out"].to(device, copy=True)}


def oracle(case: Case) -> Tensor:
    """What is added, from the definition; what mean queries lack has its own tests."""
    block_q, block_k, scale, order, valid = (case[n] for n in ("block_q", "block_k", "scale", "order", "key_valid"))
    query, key, value, lse = (case[n].double() for n in ("query", "key", "value", "lse"))
    pooled, (batch, heads, tokens, dim) = case["pooled"], query.shape
    given = {n: case[n] for n in ("order", "block_q", "block_k", "scale", "key_valid")}
    lacks = mean_query_residual(case["query"], case["key"], case["value"], pooled, **given).double()
    bias = pooled.bias.double().expand(batch, -1, -1)
    found = torch.zeros(query.shape, dtype=torch.float64) if case["more"] is None else case["more"].double()
    for b in range(batch):
        kept = torch.arange(key.shape[2]) if valid is None else valid[b].nonzero()[:, 0]
        for h in range(heads):
            places = torch.arange(tokens) if order is None else order.table[order.head[h]].long()
            for i in range(lacks.shape[2]):
                mine = places[i * block_q : (i + 1) * block_q]
                mean = query[b, h, mine].mean(0).to(case["query"].dtype).double()
                middle = lse[b, h, mine].mean()
                matrix, centre, total = torch.zeros(dim, dim).double(), torch.zeros(dim).double(), 0.0
                for j in range(pooled.k.shape[2]):
                    own = kept[kept // block_k == j]
                    if pooled.bits[b, h, i, j // 32] >> (j % 32) & 1 or not len(own):
                        continue
                    mean_k = pooled.k[b, h, j].double()
                    weight = math.exp(scale * mean @ mean_k + bias[b, 0, j] - middle)
                    covariance = (key[b, h, own] - mean_k).mT @ value[b, h, own] / len(own)
                    matrix, centre, total = matrix + weight * covariance, centre + weight * mean_k, total + weight
                apart = query[b, h, mine] - mean
                share = middle - lse[b, h, mine] + scale * (apart @ centre) / max(total, 1e-30)
                added = scale * apart @ matrix + lacks[b, h, i]
                found[b, h, mine] += share.clamp(max=0).exp()[:, None] * added
    return found


CASES = [
    pytest.param((torch.float32, 150, 64, 64, 64), {"masked": False, "ordered": True}, id="fp32"),
    pytest.param((torch.float16, 131, 72, 64, 128), {"masked": False, "ordered": False}, id="fp16-d72-wide-keys"),
    pytest.param((torch.bfloat16, 150, 128, 64, 32), {"masked": True, "ordered": True}, id="bf16-masked"),
    pytest.param((torch.float32, 70, 16, 16, 16), {"masked": True, "ordered": False, "cross": 90}, id="cross"),
    pytest.param((torch.float16, 270, 24, 128, 16), {"masked": False, "ordered": True}, id="many-queries-a-mean"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("sizes", "options"), CASES)
def test_terms_equal_the_oracle(backend: str, sizes: Any, options: Any) -> None:
    repair()
    name, device = backend.split("-")
    case = made(*sizes, **options)
    given = moved(case, device)
    assert add_first_order_(**given, backend=name) is given["out"]
    added, expected = given["out"].cpu().double() - case["out"].double(), oracle(case)
    assert (expected - _without_matrices(case)).abs().mean() > 0.02  # matrices matter
    error = (added - expected).norm() / expected.norm()
    assert error < TOLERANCE[sizes[0]], float(error)


def _without_matrices(case: Case) -> Tensor:
    return oracle(case | {"value": torch.zeros_like(case["value"])})


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_heads_and_channels_in_turns_give_the_same(
    backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    repair()
    name, device = backend.split("-")
    case = made(dtype, 100, 48, 16, 16, masked=True, ordered=True)
    whole, parts = moved(case, device), moved(case, device)
    add_first_order_(**whole, backend=name)
    monkeypatch.setattr(launch, "_LEAST", 1)
    monkeypatch.setattr(launch, "_MOST", 1)
    monkeypatch.setattr(launch, "_WEIGHTS", 2 * 7 * 16 * 4)
    turns = launch.turns_of(7, 7, 48, 4, 2, 1 << 30)
    assert (turns.planes, turns.part) == (1, 32)
    assert turns.weights in (2, 3, 4)
    add_first_order_(**parts, backend=name)
    torch.testing.assert_close(parts["out"], whole["out"], atol=0, rtol=0)


def test_turns_fill_what_they_may_take() -> None:
    for rows, dim, planes in ((72, 128, 24), (512, 128, 12), (1182, 128, 40), (278, 64, 96), (4000, 128, 2)):
        tensors = 4 * rows * 64 * dim * planes * 2
        room = max(launch._LEAST, min(launch._MOST, tensors // 7))
        turns = launch.turns_of(rows, rows, dim, planes, 2, tensors)
        size = 2 * rows * dim * turns.part * 2
        assert turns.planes * size <= room or (turns.planes, turns.part) == (1, 32)
        assert turns.planes == planes or (turns.planes + 1) * size > room
        assert turns.weights % turns.planes == 0 or turns.weights == planes
    assert launch.turns_of(512, 512, 128, 12, 2, 384 << 20) == (12, 1, 128)  # Wan 1.3B at 480p
    assert launch.turns_of(1182, 1182, 128, 10, 2, 738 << 20) == (10, 1, 128)  # a quarter of the heads of 14B at 720p


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_that_is_not_finite_stays_its_own(backend: str) -> None:
    """Its block is left without correction; all others have theirs."""
    repair()
    name, device = backend.split("-")
    case = made(torch.float32, 100, 32, 32, 32, masked=False, ordered=False)
    clean = moved(case, device)
    case["query"][0, 0, 40] = torch.nan
    case["query"][1, 1, 3] = torch.inf
    case["lse"][0, 1, 99] = torch.inf
    given = moved(case, device)
    add_first_order_(**clean, backend=name)
    add_first_order_(**given, backend=name)
    bad = torch.zeros(2, 2, 100, dtype=torch.bool)
    bad[0, 0, 40] = bad[1, 1, 3] = bad[0, 1, 99] = True
    out, block = given["out"].cpu(), torch.zeros(2, 2, 100, dtype=torch.bool)
    assert torch.isfinite(out[~bad]).all()
    block[0, 0, 32:64] = block[1, 1, :32] = block[0, 1, 96:] = True
    torch.testing.assert_close(out[~block], clean["out"].cpu()[~block], atol=0, rtol=0)
    unchanged = block & ~bad
    unchanged[0, 1, 96:] = False  # of a block whose log-sum-exp alone is not finite the mean query is known
    torch.testing.assert_close(out[unchanged], case["out"][unchanged], atol=0, rtol=0)


def test_compiles_without_a_graph_break() -> None:
    case = made(torch.float32, 100, 32, 32, 32, masked=False, ordered=True)

    def call(query: Tensor) -> Tensor:
        return add_first_order_(**case | {"query": query, "out": query * 2})

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(case["query"]), call(case["query"]))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"out": torch.zeros(2, 2, 90, 32)}, r"out must be \[2, 2, 100, 32\]"),
        ({"more": torch.zeros(2, 2, 100, 16)}, r"more must be \[2, 2, 100, 32\]"),
        ({"lse": torch.zeros(2, 2, 100, dtype=torch.float64)}, r"lse must be float32 \[2, 2, 100\]"),
        ({"block_q": 64}, r"bits must be \[B, H, 2, 1\]"),
    ],
)
def test_what_does_not_fit_is_named(changed: Case, message: str) -> None:
    case = made(torch.float32, 100, 32, 32, 32, masked=False, ordered=False)
    with pytest.raises(ValueError, match=message):
        add_first_order_(**case | changed)


@pytest.mark.gpu
def test_a_graph_gives_the_same_on_a_gpu() -> None:
    case = moved(made(torch.bfloat16, 1000, 128, 64, 64, masked=False, ordered=True), "cuda")
    again = case | {"out": case["out"].clone()}
    add_first_order_(**case)
    torch.cuda.synchronize()
    start, graph = again["out"].clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        add_first_order_(**again)
    again["out"].copy_(start)
    graph.replay()
    torch.testing.assert_close(again["out"], case["out"], atol=0, rtol=0)
