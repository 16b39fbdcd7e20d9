"""The pyramid: means of runs of tokens, their bias, and where each level of each block is."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel_kernels import GatheredKeys, Pyramid, block_sparse_attention, gathered_from_mask, pyramid, pyramid_groups
from dit_accel_kernels.lists import lists_from_levels
from dit_accel_kernels.pyramid import pyramid_rows
from tests.kernels.interpreter import repair

repair()

BACKENDS = [
    pytest.param(("reference", "cpu"), id="reference"),
    pytest.param(("cpu", "cpu"), id="cpu"),
    pytest.param(("triton", "cpu"), id="interpreter", marks=pytest.mark.interpreter),
    pytest.param(("triton", "cuda"), id="gpu", marks=pytest.mark.gpu),
]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1.6e-2}  # one rounding of a mean of values up to 4


def check(
    got: Pyramid, k: torch.Tensor, v: torch.Tensor, levels: tuple[int, ...], block: int, valid: torch.Tensor
) -> None:
    """Every key of every level of every block, one at a time."""
    (batch, heads, tokens, _), top = k.shape, max(levels)
    assert got.group == block // top
    blocks = -(-tokens // block)
    assert got.k.shape[2] == got.bias.shape[2] == sum(blocks * block // level for level in levels)
    for b in range(batch):
        for level in levels:
            for j in range(blocks):
                first = (got.offsets[level] + j * (top // level)) * got.group
                for i in range(block // level):
                    run = torch.arange(j * block + i * level, j * block + (i + 1) * level)
                    run = run[run < tokens]
                    run = run[valid[b, run]]
                    bias = float(got.bias[b if got.bias.shape[0] > 1 else 0, 0, first + i])
                    assert bias == pytest.approx(math.log(len(run)) if len(run) else -math.inf, abs=1e-6)
                    for x, pooled in ((k, got.k), (v, got.v)):
                        want = x[b, :, run].double().mean(1) if len(run) else torch.zeros(heads, x.shape[3]).double()
                        tolerance = TOLERANCE[k.dtype]
                        found = pooled[b, :, first + i].cpu().double()
                        torch.testing.assert_close(found, want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("runner", BACKENDS)
@pytest.mark.parametrize(
    ("levels", "block", "tokens", "dim", "dtype", "masked"),
    [
        ((2, 4, 8), 64, 131, 72, torch.float32, True),
        ((2, 4, 8), 64, 128, 64, torch.bfloat16, False),
        ((8, 2), 16, 33, 24, torch.float32, False),
        ((32,), 32, 70, 8, torch.float32, True),
        ((16, 64), 64, 10, 40, torch.float32, True),
    ],
)
def test_matches_the_definition(
    runner: tuple[str, str],
    levels: tuple[int, ...],
    block: int,
    tokens: int,
    dim: int,
    dtype: torch.dtype,
    masked: bool,
) -> None:
    backend, device = runner
    # Views of [B, S, H, D], as models hand them over.
    k, v = (torch.randn(2, tokens, 2, dim).to(dtype).transpose(1, 2) for _ in "kv")
    valid = torch.rand(2, tokens) < 0.7 if masked else torch.ones(2, tokens, dtype=torch.bool)
    valid[1, :4] = not masked
    dirty_k, dirty_v = (x.masked_fill(~valid[:, None, :, None], torch.nan).to(device) for x in (k, v))
    got = pyramid(
        dirty_k, dirty_v, levels=levels, block=block, key_valid=valid.to(device) if masked else None, backend=backend
    )
    assert got.k.dtype == dtype
    assert got.bias.dtype == torch.float32
    assert got.bias.shape[:2] == (2 if masked else 1, 1)
    check(got, k, v, levels, block, valid)


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.sampled_from([2, 4, 8, 16]), min_size=1, max_size=3, unique=True),
    st.sampled_from([16, 32]),
    st.integers(1, 70),
    st.integers(0, 99),
)
def test_any_size(levels: list[int], block: int, tokens: int, seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, 1, 1, tokens, 4, generator=gen)
    check(pyramid(k, v, levels=tuple(levels), block=block), k, v, tuple(levels), block, torch.ones(1, tokens).bool())


@pytest.mark.parametrize("runner", BACKENDS)
def test_attention_over_levels_is_attention_over_what_they_stand_for(runner: tuple[str, str]) -> None:
    """Keys and values that are constant on runs of 8: every level must give exact dense attention."""
    backend, device = runner
    tokens = 64 + 24
    q = torch.randn(1, 2, 40, 16, device=device)
    k, v = (torch.randn(1, 2, tokens // 8, 16, device=device).repeat_interleave(8, 2) for _ in "kv")
    level_map = torch.tensor([[[[1, 2, 4], [8, 8, 1]], [[4, 1, 1], [2, 8, 8]]]], dtype=torch.uint8, device=device)
    pooled = pyramid(k, v, block=32, backend=backend)
    groups = pyramid_groups(level_map)
    assert groups.shape == (1, 2, 2, 3 * (4 + 2 + 1))
    gathered = GatheredKeys(pooled.k, pooled.v, pooled.bias, *gathered_from_mask(groups), pooled.group)
    exact = lists_from_levels((level_map == 1).to(torch.uint8), 32, 32)
    got, lse = block_sparse_attention(q, k, v, exact, gathered=gathered, return_lse=True, backend=backend)
    logits = q.double() @ k.double().mT / 4
    torch.testing.assert_close(got.double(), logits.softmax(-1) @ v.double(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("runner", BACKENDS)
@pytest.mark.parametrize(
    ("shape", "levels"),
    [((1, 2, 3, 7), (2, 4, 8)), ((2, 1, 2, 1100), (2, 4, 8)), ((1, 1, 4, 33), (16, 2)), ((2, 2, 1, 5), (4,))],
)
def test_rows_hold_the_groups_of_the_map(
    runner: tuple[str, str], shape: tuple[int, ...], levels: tuple[int, ...]
) -> None:
    backend, device = runner
    draw = torch.randint(0, 3 + len(levels), shape, generator=torch.Generator().manual_seed(0))
    level_map = torch.tensor([0, 1, 3, *levels], dtype=torch.uint8)[draw]
    level_map[..., 0, :] = 0
    start, count, indices = (x.cpu() for x in pyramid_rows(level_map.to(device), levels=levels, backend=backend))
    assert {start.dtype, count.dtype, indices.dtype} == {torch.int32}
    assert start.shape == count.shape == shape[:3]
    want = pyramid_groups(level_map, levels=levels).flatten(0, 2)
    for row, first, n in zip(want, start.flatten().tolist(), count.flatten().tolist(), strict=True):
        assert indices[first : first + n].tolist() == row.nonzero().flatten().tolist()


def test_rows_compile_in_one_graph() -> None:
    level_map = torch.randint(0, 5, (1, 2, 3, 9)).to(torch.uint8)
    step = torch.compile(lambda x: pyramid_rows(x)[1] * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(step(level_map), pyramid_rows(level_map)[1] * 2)


def test_compiles_in_one_graph() -> None:
    k, v = torch.randn(2, 1, 2, 70, 16)
    step = torch.compile(lambda k, v: tuple(pyramid(k * 2, v, block=32)[:3]), fullgraph=True, backend="aot_eager")
    for got, want in zip(step(k, v), pyramid(k * 2, v, block=32)[:3]):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"levels": (3,)}, r"levels must be different powers of two from 2 to block=64, got \(3,\)"),
        ({"levels": ()}, "levels must be"),
        ({"levels": (2, 2)}, "levels must be"),
        ({"levels": (1, 2)}, "levels must be"),
        ({"levels": (128,)}, "levels must be"),
        ({"block": 48}, "block must be a power of two from 2 on, got 48"),
        ({"block": 256, "levels": (2,)}, "block must be at most .* 128, got 256"),
        ({"key_valid": torch.ones(1, 3).bool()}, r"key_valid must be \(1, 70\), got \(1, 3\)"),
        ({"v": torch.zeros(1, 1, 71, 8)}, "k and v must agree"),
        ({"k": torch.zeros(1, 70, 8)}, r"k must be \[B, H, S, D\]"),
    ],
)
def test_wrong_arguments_raise(change: dict[str, object], message: str) -> None:
    args: dict[str, object] = {"k": torch.zeros(1, 1, 70, 8), "v": torch.zeros(1, 1, 70, 8), **change}
    with pytest.raises(ValueError, match=message):
        pyramid(**args)  # type: ignore[arg-type]


def test_wrong_maps_raise() -> None:
    with pytest.raises(ValueError, match="level_map must be uint8"):
        pyramid_groups(torch.zeros(1, 1, 2, 3))
    with pytest.raises(ValueError, match="levels must be from 2 to 128"):
        pyramid_groups(torch.zeros(1, 1, 2, 3, dtype=torch.uint8), levels=(256,))
