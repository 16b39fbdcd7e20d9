"""The best blocks of heads and rows, without a sort, against sorting."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel_kernels.compress import compress_levels
from dit_accel_kernels.lists import lists_from_levels, pack_bits
from dit_accel_kernels.select import keep_best, unkept_energy
from tests.kernels.interpreter import repair

BACKENDS = [
    "reference",
    "cpu",
    pytest.param("triton-cpu", marks=pytest.mark.interpreter),
    pytest.param("triton-cuda", marks=pytest.mark.gpu),
]


def draw(kind: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Scores of several kinds: spread over many powers of two, with ties, mostly 0, of both signs."""
    torch.manual_seed(len(kind) + shape[-1])
    if kind == "wide":
        return torch.exp(6 * torch.randn(shape) - 8)
    if kind == "ties":
        return torch.randint(0, 4, shape).float()
    if kind == "zeros":
        return torch.rand(shape) * (torch.rand(shape) < 0.1)
    return torch.randn(shape)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("by_head", [True, False], ids=["head", "row"])
@pytest.mark.parametrize("kind", ["wide", "ties", "zeros", "signed"])
def test_keeps_the_best(backend: str, by_head: bool, kind: str) -> None:
    """Forced columns come out of the budget, forced rows do not; every row keeps its best."""
    repair()
    name, _, device = backend.partition("-")
    scores = draw(kind, (1, 2, 4, 1100))
    scores[0, 1, 3, 5], scores[0, 0, 2] = float("nan"), float("inf")
    rows = torch.arange(4) == 1
    cols = torch.isin(torch.arange(1100), torch.tensor([3, 1099]))
    for forced in (False, True):
        flags = {"rows": rows.to(device or "cpu"), "cols": cols.to(device or "cpu")} if forced else {}
        size = 4400 if by_head else 1100
        for count in (1, size // 5, size):
            kept = keep_best(scores.to(device or "cpu"), count, by_head=by_head, backend=name, **flags).cpu()
            assert kept.dtype == torch.uint8
            clean = scores.nan_to_num(0, 0, 0)
            if forced:
                clean = clean.masked_fill(cols, float("inf"))
                assert kept[:, :, 1].all()
                assert kept[..., cols].all()
            groups = clean.flatten(2) if by_head else clean
            border = groups.topk(count, -1).values[..., -1:]
            exactly = (groups >= border).view_as(kept)
            sure = (groups > border).view_as(kept)
            free = torch.ones(4, dtype=torch.bool) if not forced else ~rows
            assert (kept.bool() | ~sure)[:, :, free].all()
            best = clean == clean.amax(-1, keepdim=True)
            assert (best & kept.bool()).any(-1).all()
            extra = kept.bool() & ~exactly  # the best of a row and what is forced, nothing else
            assert (extra[:, :, free].sum(-1) <= 1 + 2 * forced).all()
            if not by_head and not forced:
                assert (kept.sum(-1) == count).all()


@pytest.mark.parametrize("backend", BACKENDS[2:])
@pytest.mark.parametrize("kind", ["wide", "ties", "signed"])
def test_many_programs_count_for_one_head(backend: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    repair()
    from dit_accel_kernels.select import triton as kernels

    device = backend.partition("-")[2]
    scores = draw(kind, (1, 3, 5, 500)).to(device)
    cols = (torch.arange(500) == 7).to(device)
    alone = keep_best(scores, 600, by_head=True, cols=cols, backend="triton")
    monkeypatch.setattr(kernels, "_ALONE", 1000)
    monkeypatch.setattr(kernels, "_PART", 512)
    assert torch.equal(keep_best(scores, 600, by_head=True, cols=cols, backend="triton"), alone)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["wide", "ties", "zeros"])
@pytest.mark.parametrize("size", [7, 300, 5000])
def test_energy_of_what_is_not_kept(backend: str, kind: str, size: int) -> None:
    repair()
    name, _, device = backend.partition("-")
    scores = draw(kind, (2, 3, size))
    scores[0, 0, 2] = float("nan")
    ranked = scores.nan_to_num(0).double().square().sort(-1, descending=True).values
    for count in (1, 2 + size // 4, size):
        got = unkept_energy(scores.to(device or "cpu"), count, backend=name)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.cpu().double(), ranked[..., count:].sum(-1), rtol=1e-4, atol=1e-30)


levels = st.tuples(
    st.integers(1, 2), st.integers(1, 3), st.integers(1, 5), st.integers(1, 70), st.floats(0, 1), st.integers(0, 99)
)


def check_compressed(backend: str, args: tuple[int, int, int, int, float, int], room: float | None) -> None:
    """Bits, lists and density against the functions that each make one of them."""
    repair()
    name, _, device = backend.partition("-")
    batch, heads, qb, kb, density, seed = args
    gen = torch.Generator().manual_seed(seed)
    pick = torch.rand(batch, heads, qb, kb, generator=gen) < density
    mask = torch.where(torch.rand(pick.shape, generator=gen) < 0.3, 255, 1).mul(pick).to(torch.uint8)
    capacity = None if room is None else max(1, int(room * int((mask != 0).sum())))
    q_len, k_len = qb * 16 - 3, kb * 8 - 5
    sizes = {"q_len": q_len, "k_len": k_len, "block_q": 16, "block_k": 8}
    bits, lists, share = compress_levels(mask.to(device or "cpu"), capacity=capacity, backend=name, **sizes)
    want = lists_from_levels(mask, 16, 8, capacity=capacity)
    assert torch.equal(bits.cpu(), pack_bits(mask))
    assert lists.partial is not None
    assert want.partial is not None
    for got, right in ((lists.row_start, want.row_start), (lists.full, want.full), (lists.partial, want.partial)):
        assert torch.equal(got.cpu(), right)
    used = torch.zeros(want.indices.shape, dtype=torch.bool)
    for row in range(want.full.numel()):
        first = int(want.row_start.flatten()[row])
        used[first : first + int(want.full.flatten()[row] + want.partial.flatten()[row])] = True
    assert torch.equal(lists.indices.cpu()[used], want.indices[used])
    tokens = (mask != 0).repeat_interleave(16, 2)[:, :, :q_len].repeat_interleave(8, 3)[..., :k_len]
    torch.testing.assert_close(share.cpu(), tokens.double().mean((2, 3)).float(), rtol=1e-5, atol=1e-7)


@settings(deadline=None, max_examples=30)
@given(levels, st.sampled_from([None, 1.0, 0.5]))
def test_levels_are_compressed(args: tuple[int, int, int, int, float, int], room: float | None) -> None:
    check_compressed("cpu", args, room)


@pytest.mark.parametrize("backend", BACKENDS[2:])
@pytest.mark.parametrize("room", [None, 1.0, 0.5])
@pytest.mark.parametrize(
    "args", [(1, 2, 5, 70, 0.3, 1), (2, 1, 3, 32, 1.0, 2), (1, 1, 2, 2100, 0.5, 3), (1, 2, 3, 1, 0.4, 4)]
)
def test_levels_are_compressed_by_triton(
    backend: str, args: tuple[int, int, int, int, float, int], room: float | None
) -> None:
    check_compressed(backend, args, room)


def test_bad_arguments_are_named() -> None:
    scores = torch.zeros(1, 1, 2, 3)
    with pytest.raises(ValueError, match="count must be between 1 and 6, got 7"):
        keep_best(scores, 7, by_head=True)
    with pytest.raises(ValueError, match="scores must be float32"):
        keep_best(scores.double(), 1, by_head=True)
    with pytest.raises(ValueError, match=r"cols must be bool \[3\]"):
        keep_best(scores, 1, by_head=True, cols=torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"scores must be \[B, H, Qb, Kb\]"):
        keep_best(scores[0], 1, by_head=True)
    with pytest.raises(ValueError, match="count must be between 1 and 3, got 0"):
        unkept_energy(scores, 0)
    sizes = {"q_len": 2, "k_len": 3, "block_q": 1, "block_k": 1}
    with pytest.raises(ValueError, match="levels must be uint8"):
        compress_levels(scores, **sizes)
    with pytest.raises(ValueError, match="capacity must be positive"):
        compress_levels(scores.to(torch.uint8), capacity=0, **sizes)
    with pytest.raises(ValueError, match="block sizes must be positive"):
        compress_levels(scores.to(torch.uint8), q_len=2, k_len=3, block_q=0, block_k=1)


def test_compiles_without_a_graph_break() -> None:
    scores = torch.rand(1, 2, 5, 9)

    def call(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        kept = keep_best(x * 2, 9, by_head=True)
        made = compress_levels(kept, q_len=10, k_len=18, block_q=2, block_k=2, capacity=28)
        return kept, unkept_energy(x, 3), made.bits, made.lists.indices, made.density

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(scores), call(scores), strict=True):
        torch.testing.assert_close(got, want)
