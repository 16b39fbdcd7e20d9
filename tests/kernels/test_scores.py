"""Scores of blocks against loops written from the papers' formulas, in float64 and one pair of tokens at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel_kernels import (
    TokenOrder,
    antidiagonal_scores,
    attention_lse,
    block_mass,
    sample_blocks,
    sampled_scores,
    subblock_scores,
)
from dit_accel_kernels.scores import reduce
from tests.kernels.interpreter import repair

repair()

RUNNERS = [
    pytest.param(("reference", "cpu"), id="reference"),
    pytest.param(("cpu", "cpu"), id="cpu"),
    pytest.param(("triton", "cpu"), id="interpreter", marks=pytest.mark.interpreter),
    pytest.param(("triton", "cuda"), id="gpu", marks=pytest.mark.gpu),
]
# float32 throughout: sums of a few hundred products. bfloat16: means of sub-blocks are rounded once (2**-9 of a logit of up
# to 4); antidiagonals and samples multiply the inputs as they are.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def draw(
    sq: int, sk: int, dim: int, *, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, TokenOrder, torch.Tensor]:
    """Queries and keys as models hand them over (views of [B, S, H, D]), an order, and valid keys of two examples."""
    gen = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(2, n, 2, dim, generator=gen).to(device, dtype).transpose(1, 2) for n in (sq, sk))
    table = torch.stack([torch.randperm(sq, generator=gen) for _ in range(3)]).int().to(device)
    order = TokenOrder(table, torch.tensor([2, 0], dtype=torch.int32, device=device))
    valid = torch.rand(2, sk, generator=gen) < 0.6
    valid[0, : sk // 3] = False  # whole blocks, too
    return q, k, order, valid.to(device)


def plain(
    q: torch.Tensor, k: torch.Tensor, order: TokenOrder | None, valid: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Float64 on the CPU: queries in block order, keys with 0 where invalid, and what is valid."""
    q, k = q.cpu().double(), k.cpu().double()
    if order is not None:
        table = order.table.cpu()[order.head.cpu().long()].long()
        q = torch.stack([q[:, h, table[h]] for h in range(q.shape[1])], 1)
    seen = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool) if valid is None else valid.cpu()
    return q, k.masked_fill(~seen[:, None, :, None], 0), seen


def softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    if top == -math.inf:
        return [0.0] * len(logits)
    weights = [math.exp(x - top) for x in logits]
    return [w / sum(weights) for w in weights]


def oracle_antidiagonal(
    q: torch.Tensor, k: torch.Tensor, seen: torch.Tensor, block_q: int, block_k: int, n: int, scale: float
) -> torch.Tensor:
    (batch, heads, sq, _), sk = q.shape, k.shape[2]
    qb, kb = -(-sq // block_q), -(-sk // block_k)
    out = torch.zeros(batch, heads, qb, kb, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            dots = q[b, h] @ k[b, h].T
            rows = -(-sq // n)
            for i in range(rows):
                logits = []
                for j in range(kb * block_k // n):
                    pairs = [(i * n + n - 1 - t, j * n + t) for t in range(n)]
                    total = sum(float(dots[r, c]) for r, c in pairs if r < sq and c < sk)
                    any_valid = bool(seen[b, j * n : j * n + n].any())
                    logits.append(total * scale / n if any_valid else -math.inf)
                for j, share in enumerate(softmax(logits)):
                    out[b, h, i * n // block_q, j * n // block_k] += share
            for block in range(qb):
                out[b, h, block] /= -(-min(block_q, sq - block * block_q) // n)
    return out


def oracle_sampled(
    q: torch.Tensor,
    k: torch.Tensor,
    seen: torch.Tensor,
    q_index: torch.Tensor,
    k_index: torch.Tensor,
    kind: str,
    scale: float,
) -> torch.Tensor:
    batch, heads = q.shape[:2]
    (qb, kb) = q_index.shape[1], k_index.shape[1]
    out = torch.zeros(batch, heads, qb, kb, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            own_q, own_k = (x[h if x.shape[0] > 1 else 0].tolist() for x in (q_index, k_index))
            keys = [(j, c) for j, row in enumerate(own_k) for c in row if 0 <= c < k.shape[2] and seen[b, c]]
            for i, row in enumerate(own_q):
                mine = [r for r in row if 0 <= r < q.shape[2]]
                for r in mine:
                    shares = softmax([float(q[b, h, r] @ k[b, h, c]) * scale for _, c in keys]) if keys else []
                    for (j, _), share in zip(keys, shares):
                        if kind == "max":
                            out[b, h, i, j] = max(float(out[b, h, i, j]), share)
                        else:
                            out[b, h, i, j] += share / len(mine)
    return out


def oracle_subblock(
    q: torch.Tensor, k: torch.Tensor, seen: torch.Tensor, block_q: int, block_k: int, parts: int, scale: float
) -> torch.Tensor:
    (batch, heads, sq, _), sk = q.shape, k.shape[2]
    qb, kb = -(-sq // block_q), -(-sk // block_k)
    out = torch.full((batch, heads, qb, kb), -torch.inf, dtype=torch.float64)

    def means(x: torch.Tensor, valid: torch.Tensor, block: int, size: int) -> list[torch.Tensor]:
        runs = [torch.arange(block + a * size, block + (a + 1) * size) for a in range(parts)]
        runs = [run[run < len(x)] for run in runs]
        runs = [run[valid[run]] for run in runs]
        return [x[run].mean(0) for run in runs if len(run)]

    for b in range(batch):
        for h in range(heads):
            for i in range(qb):
                for j in range(kb):
                    ours = means(q[b, h], torch.ones(sq, dtype=torch.bool), i * block_q, block_q // parts)
                    theirs = means(k[b, h], seen[b], j * block_k, block_k // parts)
                    pairs = [scale * float(x @ y) for x in ours for y in theirs]
                    if pairs:
                        out[b, h, i, j] = torch.tensor(pairs, dtype=torch.float64).logsumexp(0)
    return out


SHAPES = [
    pytest.param(48, 64, 16, 32, 16, torch.float32, id="even"),
    pytest.param(50, 37, 24, 16, 32, torch.float32, id="ragged"),
    pytest.param(33, 70, 72, 16, 16, torch.bfloat16, id="ragged-bf16"),
    pytest.param(5, 3, 8, 16, 16, torch.float32, id="shorter-than-a-block"),
]


def poisoned(k: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    return k if valid is None else k.masked_fill(~valid[:, None, :, None], torch.nan)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize(("sq", "sk", "dim", "block_q", "block_k", "dtype"), SHAPES)
def test_antidiagonal(
    runner: tuple[str, str], masked: bool, sq: int, sk: int, dim: int, block_q: int, block_k: int, dtype: torch.dtype
) -> None:
    backend, device = runner
    q, k, order, valid = draw(sq, sk, dim, device=device, dtype=dtype)
    given_order, given_valid = (order, valid) if masked else (None, None)
    got = antidiagonal_scores(
        q, poisoned(k, given_valid), block_q=block_q, block_k=block_k, stride=4, order=given_order,
        key_valid=given_valid, backend=backend,
    )  # fmt: skip
    want = oracle_antidiagonal(*plain(q, k, given_order, given_valid), block_q, block_k, 4, dim**-0.5)
    torch.testing.assert_close(got.cpu().double(), want, atol=2e-6, rtol=2e-6)
    assert got.dtype == torch.float32


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("kind", ["max", "mean"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize(("sq", "sk", "dim", "block_q", "block_k", "dtype"), SHAPES)
def test_sampled(
    runner: tuple[str, str],
    kind: str,
    masked: bool,
    sq: int,
    sk: int,
    dim: int,
    block_q: int,
    block_k: int,
    dtype: torch.dtype,
) -> None:
    backend, device = runner
    q, k, order, valid = draw(sq, sk, dim, device=device, dtype=dtype)
    given_order, given_valid = (order, valid) if masked else (None, None)
    q_index = sample_blocks(sq, block_q, 4)
    k_index = sample_blocks(sk, block_k, 4, generator=torch.Generator().manual_seed(1))
    if masked:  # each head has samples of its own
        k_index = torch.cat([k_index, sample_blocks(sk, block_k, 4)])
    got = sampled_scores(
        q, poisoned(k, given_valid), q_index.to(device), k_index.to(device), reduce=kind, order=given_order,
        key_valid=given_valid, backend=backend,
    )  # fmt: skip
    want = oracle_sampled(*plain(q, k, given_order, given_valid), q_index, k_index, kind, dim**-0.5)
    torch.testing.assert_close(got.cpu().double(), want, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize(("sq", "sk", "dim", "block_q", "block_k", "dtype"), SHAPES)
@pytest.mark.parametrize("parts", [1, 4])
def test_subblock(
    runner: tuple[str, str],
    masked: bool,
    sq: int,
    sk: int,
    dim: int,
    block_q: int,
    block_k: int,
    dtype: torch.dtype,
    parts: int,
) -> None:
    backend, device = runner
    q, k, order, valid = draw(sq, sk, dim, device=device, dtype=dtype)
    given_order, given_valid = (order, valid) if masked else (None, None)
    got = subblock_scores(
        q, poisoned(k, given_valid), block_q=block_q, block_k=block_k, parts=parts, order=given_order,
        key_valid=given_valid, backend=backend,
    )  # fmt: skip
    want = oracle_subblock(*plain(q, k, given_order, given_valid), block_q, block_k, parts, dim**-0.5)
    torch.testing.assert_close(got.cpu().double(), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("runner", RUNNERS)
def test_every_token_sampled_is_block_mass(runner: tuple[str, str]) -> None:
    backend, device = runner
    q, k, order, valid = draw(50, 37, 16, device=device)
    index = [sample_blocks(n, 16, 16, device=device) for n in (50, 37)]
    got = sampled_scores(q, k, *index, reduce="mean", order=order, key_valid=valid, backend=backend)
    lse = attention_lse(q, k, key_valid=valid, backend="reference")
    want = block_mass(q, k, lse, block_q=16, block_k=16, order=order, key_valid=valid, backend="reference")
    torch.testing.assert_close(got, want, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("runner", RUNNERS)
def test_stride_one_is_block_mass(runner: tuple[str, str]) -> None:
    backend, device = runner
    q, k, order, valid = draw(50, 37, 16, device=device)
    got = antidiagonal_scores(q, k, block_q=16, block_k=16, stride=1, order=order, key_valid=valid, backend=backend)
    lse = attention_lse(q, k, key_valid=valid, backend="reference")
    want = block_mass(q, k, lse, block_q=16, block_k=16, order=order, key_valid=valid, backend="reference")
    torch.testing.assert_close(got, want, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("runner", RUNNERS)
def test_an_example_without_a_valid_key(runner: tuple[str, str]) -> None:
    backend, device = runner
    q, k, _, valid = draw(20, 20, 8, device=device)
    valid[1] = False
    index = sample_blocks(20, 8, 2, device=device)
    options = {"key_valid": valid, "backend": backend}
    assert not antidiagonal_scores(q, k, block_q=8, block_k=8, stride=4, **options)[1].any()
    for kind in ("max", "mean"):
        assert not sampled_scores(q, k, index, index, reduce=kind, **options)[1].any()
    assert (subblock_scores(q, k, block_q=8, block_k=8, **options)[1] == -torch.inf).all()


@pytest.mark.parametrize("chunk", [1, 3000])
def test_chunks_change_nothing(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, order, valid = draw(150, 90, 8)
    q_index, k_index = sample_blocks(150, 16, 4), sample_blocks(90, 16, 4)

    def scores() -> list[torch.Tensor]:
        options = {"order": order, "key_valid": valid, "backend": "cpu"}
        return [
            antidiagonal_scores(q, k, block_q=16, block_k=16, stride=4, **options),
            sampled_scores(q, k, q_index, k_index, **options),
            subblock_scores(q, k, block_q=16, block_k=16, **options),
        ]

    whole = scores()
    for module in ("antidiagonal", "sampled", "subblock", "reduce"):
        monkeypatch.setattr(f"dit_accel_kernels.scores.{module}.CHUNK_ELEMENTS", chunk)
    for got, want in zip(scores(), whole):
        torch.testing.assert_close(got, want)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor holds more than a chunk; the strided map would have 4 * 512 * 512 numbers."""
    monkeypatch.setattr("dit_accel_kernels.scores.antidiagonal.CHUNK_ELEMENTS", 40_000)
    monkeypatch.setattr(reduce, "CHUNK_ELEMENTS", 40_000)
    q, k, _, _ = draw(2048, 2048, 8)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else (out,):
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.numel())
            return out

    with Watch():
        antidiagonal_scores(q, k, block_q=32, block_k=32, stride=4, backend="cpu")
    assert largest <= max(40_000, k.numel())
    assert largest < 4 * 512 * 512 // 8


@settings(deadline=None, max_examples=40)
@given(
    sq=st.integers(1, 60), sk=st.integers(1, 60), stride=st.sampled_from([1, 2, 4, 8]), seed=st.integers(0, 99),
    masked=st.booleans(),
)  # fmt: skip
def test_rows_sum_to_one(sq: int, sk: int, stride: int, seed: int, masked: bool) -> None:
    q, k, order, valid = draw(sq, sk, 8, seed=seed)
    valid[:, -1] = True
    options = {"order": order, "key_valid": valid if masked else None}
    got = antidiagonal_scores(q, k, block_q=16, block_k=8, stride=stride, **options)
    torch.testing.assert_close(got.sum(-1), torch.ones(got.shape[:3]))
    index = sample_blocks(sq, 16, 3), sample_blocks(sk, 8, 8)
    mean, top = (sampled_scores(q, k, *index, reduce=kind, **options) for kind in ("mean", "max"))
    torch.testing.assert_close(mean.sum(-1), torch.ones(mean.shape[:3]))
    assert (top <= 1).all()


@settings(deadline=None, max_examples=60)
@given(tokens=st.integers(1, 100), block=st.integers(1, 40), data=st.data(), seed=st.none() | st.integers(0, 99))
def test_samples_are_different_tokens_of_their_block(
    tokens: int, block: int, data: st.DataObject, seed: int | None
) -> None:
    samples = data.draw(st.integers(1, block))
    gen = None if seed is None else torch.Generator().manual_seed(seed)
    index = sample_blocks(tokens, block, samples, generator=gen)
    assert index.dtype == torch.int32
    assert index.shape == (1, -(-tokens // block), samples)
    for j, row in enumerate(index[0].tolist()):
        there = [r for r in row if r >= 0]
        assert there == sorted(set(there))
        assert len(there) == min(samples, block, tokens - j * block)
        assert all(j * block <= r < min(tokens, (j + 1) * block) for r in there)


def test_compiles_in_one_graph() -> None:
    q, k, order, valid = draw(50, 37, 8)
    index = sample_blocks(50, 16, 4), sample_blocks(37, 16, 4)

    def step(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        options = {"order": order, "key_valid": valid}
        a = antidiagonal_scores(q * 2, k, block_q=16, block_k=16, stride=4, **options)
        b = sampled_scores(q * 2, k, *index, **options)
        return a + b + subblock_scores(q * 2, k, block_q=16, block_k=16, **options).exp()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k), step(q, k))


def test_custom_op_is_sound() -> None:
    rows, cols, seen = torch.randn(1, 2, 9, 8), torch.randn(1, 2, 12, 8), torch.rand(1, 1, 12) < 0.5
    args = (rows, cols, 4, 0.5, seen, False)
    torch.library.opcheck(reduce._block_logits_op, args, test_utils=("test_schema", "test_faketensor"))


Q = torch.zeros(1, 2, 32, 8)
INDEX = torch.zeros(1, 2, 4, dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: antidiagonal_scores(Q, Q, block_q=16, block_k=12), "blocks must be multiples of stride=8, got"),
        (lambda: antidiagonal_scores(Q, Q, block_q=16, block_k=16, stride=0), "multiples of stride=0"),
        (lambda: subblock_scores(Q, Q, block_q=16, block_k=18), "blocks must be multiples of parts=4, got"),
        (lambda: subblock_scores(Q, Q[:, :1], block_q=16, block_k=16), "agree in B, H, D and dtype"),
        (lambda: subblock_scores(Q, Q, block_q=0, block_k=16), "at least one token"),
        (lambda: subblock_scores(Q, Q, block_q=16, block_k=16, scale=0.0), "scale must be positive, got 0.0"),
        (lambda: sampled_scores(Q, Q, INDEX, INDEX, reduce="sum"), "reduce must be 'max' or 'mean', got 'sum'"),
        (lambda: sampled_scores(Q, Q, INDEX[0], INDEX), r"q_index must be an integer \[2\|1, blocks, samples\]"),
        (lambda: sampled_scores(Q, Q, INDEX, INDEX.float()), "k_index must be an integer"),
        (lambda: sampled_scores(Q, Q, INDEX, INDEX, key_valid=torch.ones(1, 31).bool()), "key_valid must be"),
        (lambda: sampled_scores(Q, Q, INDEX, INDEX, backend="cuda"), "backend must be"),
        (lambda: sample_blocks(10, 4, 5), "samples in 1 to block"),
    ],
)
def test_wrong_arguments_raise(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
