"""Keys gathered in groups, in one softmax with exact blocks, windows and the pooled remainder."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel_kernels.block_sparse import _op, block_sparse_attention
from dit_accel_kernels.lists import gathered_from_mask, lists_from_levels
from dit_accel_kernels.types import GatheredKeys
from tests.kernels.problems import RUNNERS, Case, Problem, check, gather, make


def attend(p: Problem, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    out = block_sparse_attention(p.q, p.k, p.v, p.lists, **p.extras(), return_lse=True, backend=backend)
    assert isinstance(out, tuple)
    return out


SMALL = {"sq": 70, "sk": 75, "block_q": 32, "block_k": 16}
CASES = [
    Case("columns", group=1, **SMALL),
    Case("groups-of-8", group=8, **SMALL),
    Case("groups-of-64", group=64, extra=200, **SMALL),
    Case("even", group=8, extra=64, sq=64, sk=64, block_q=32, block_k=32),
    Case("one-key", group=16, extra=1, **SMALL),
    Case("many", group=2, extra=700, gather_density=0.6, heads=1, list_shape=(1, 1), **SMALL),
    Case("all-groups", group=8, gather_density=1.1, **SMALL),
    Case("nothing-else", group=4, density=0.0, **SMALL),
    Case("nothing-gathered", group=4, gather_density=0.0, **SMALL),
    Case("nothing-at-all", group=4, density=0.0, gather_density=0.0, **SMALL),
    Case("no-blocks-but-pooled", group=4, density=0.0, pooled=True, order=True, **SMALL),
    Case("d8", group=8, dim=8, **SMALL),
    Case("d72-bf16", group=8, dim=72, dtype=torch.bfloat16, **SMALL),
    Case("d80-pooled", group=8, dim=80, pooled=True, **SMALL),
    Case("d96-fp16", group=2, dim=96, dtype=torch.float16, order=True, **SMALL),
    Case("d112", group=16, dim=112, **SMALL),
    Case("d128-bf16", group=8, dim=128, dtype=torch.bfloat16, pooled=True, order=True, **SMALL),
    Case("d256", group=1, dim=256, heads=1, list_shape=(1, 1), **SMALL),
    Case("batch-2-own-lists", group=8, batch=2, list_shape=(2, 2), **SMALL),
    Case("batch-2-shared-lists", group=8, batch=2, list_shape=(1, 1), **SMALL),
    Case("batch-2-shared-heads", group=1, batch=2, list_shape=(2, 1), pooled=True, **SMALL),
    Case("all", group=8, batch=2, order=True, pooled=True, windows=True, valid=True, dim=40, **SMALL),
    Case("mostly-empty-rows", group=32, density=0.1, gather_density=0.2, **SMALL),
]


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_oracle(case: Case, runner: tuple[str, str]) -> None:
    backend, device = runner
    p = make(case, device)
    check(p, *attend(p, backend))


BIG = [
    Case("1000", sq=1000, sk=1000, heads=3, list_shape=(1, 3), group=8, extra=875, block_q=128, block_k=128),
    Case(
        "4097-bf16", sq=4097, sk=1111, dim=128, group=1, extra=1111, gather_density=0.1, block_q=128, block_k=64,
        pooled=True, order=True, dtype=torch.bfloat16,
    ),
    Case("1000-windows", sq=1000, sk=500, dim=96, windows=True, valid=True, group=16, extra=501, dtype=torch.float16),
]  # fmt: skip


@pytest.mark.parametrize("runner", [RUNNERS[1], RUNNERS[3]])
@pytest.mark.parametrize("case", BIG, ids=str)
def test_matches_oracle_at_size(case: Case, runner: tuple[str, str]) -> None:
    test_matches_oracle(case, runner)


@settings(deadline=None, max_examples=25)
@given(
    sq=st.integers(1, 90), extra=st.integers(1, 90), group=st.sampled_from([1, 2, 4, 8, 16, 32, 64]),
    density=st.floats(0, 1), gather_density=st.floats(0, 1), order=st.booleans(), pooled=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_cpu_matches_oracle(**drawn: object) -> None:
    case = Case("drawn", sk=45, block_q=32, block_k=16, dim=8, batch=2, **drawn)  # type: ignore[arg-type]
    p = make(case, "cpu")
    check(p, *attend(p, "cpu"))


@pytest.mark.parametrize("runner", RUNNERS)
def test_heads_of_three_kinds_in_one_call(runner: tuple[str, str]) -> None:
    """Head 0 has exact blocks only, head 1 gathered keys only, head 2 no block but the pooled remainder, head 3 all."""
    backend, device = runner
    p = make(Case("mixed", heads=4, list_shape=(1, 4), group=8, pooled=True, **SMALL), device)
    assert p.mask is not None
    assert p.gathered is not None
    assert p.pooled is not None
    p.levels[:, 1:3] = 0
    p.mask[:, 0] = p.mask[:, 2] = False
    lists = lists_from_levels(p.levels.to(device), 32, 16)
    p.lists = replace(lists, partial=None)
    p.gathered = gather(p.mask, p.gathered.k, p.gathered.v, p.gathered.bias, 8)
    kb = p.levels.shape[-1]
    pooling = torch.tensor([False, False, True, True], device=device)[None, :, None, None]
    exact = (p.levels != 0).to(device) | ~pooling
    words = F.pad(exact.long(), (0, 32 - kb)) << torch.arange(32, device=device)
    p.pooled = replace(p.pooled, bits=words.sum(-1, keepdim=True).int())
    out, lse = attend(p, backend)
    for h in range(4):
        one = [x[:, h : h + 1] for x in (p.q, p.k, p.v)]
        head = Problem(*one, p.levels[:, h : h + 1], p.lists, None, None, None, None)
        if h in (1, 3):
            g = p.gathered
            head.gathered = replace(g, k=g.k[:, h : h + 1], v=g.v[:, h : h + 1], bias=g.bias[:, h : h + 1])
            head.mask = p.mask[:, h : h + 1]
        if h in (2, 3):
            head.pooled = replace(p.pooled, k=p.pooled.k[:, h : h + 1], v=p.pooled.v[:, h : h + 1])
        check(head, out[:, h : h + 1], lse[:, h : h + 1])


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("group", [1, 8, 64])
def test_what_is_not_selected_is_never_read(runner: tuple[str, str], poison: float, group: int) -> None:
    """Poison in groups that no row lists, in keys with a bias of -inf and in blocks that no row visits."""
    backend, device = runner
    p = make(Case("poison", group=group, extra=3 * group + 1, heads=1, list_shape=(1, 1), **SMALL), device)
    assert p.mask is not None
    assert p.gathered is not None
    p.mask[...] = torch.tensor([[1, 0, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]]).bool()
    p.levels[..., 1] = 0
    p.lists = replace(lists_from_levels(p.levels.to(device), 32, 16), partial=None)
    p.gathered = gather(p.mask, p.gathered.k, p.gathered.v, p.gathered.bias, group)
    want, want_lse = attend(p, backend)
    check(p, want, want_lse)
    hidden = (p.gathered.bias == -torch.inf)[..., None].clone()
    hidden[:, :, group : 2 * group] = True
    bias = p.gathered.bias.clone()
    bias[:, :, group : 2 * group] = torch.nan
    more = replace(p.gathered, k=p.gathered.k.masked_fill(hidden, poison), v=p.gathered.v.masked_fill(hidden, poison))
    p.gathered = replace(more, bias=bias)
    p.k, p.v = p.k.clone(), p.v.clone()
    p.k[:, :, 16:32] = p.v[:, :, 16:32] = poison
    got, got_lse = attend(p, backend)
    assert torch.equal(got, want)
    assert torch.equal(got_lse, want_lse)


@pytest.mark.parametrize("runner", RUNNERS)
def test_entries_that_no_row_counts_are_not_followed(runner: tuple[str, str]) -> None:
    backend, device = runner
    p = make(Case("entries", group=4, **SMALL), device)
    want, want_lse = attend(p, backend)
    assert p.gathered is not None
    start, count, indices = p.gathered.row_start, p.gathered.count, p.gathered.indices.clone()
    entry = torch.arange(len(indices), device=device)
    read = (entry >= start.flatten()[:, None]) & (entry < (start + count).flatten()[:, None])
    indices[~read.any(0)] = 2**30
    p.gathered = replace(p.gathered, indices=indices)
    got, got_lse = attend(p, backend)
    assert torch.equal(got, want)
    assert torch.equal(got_lse, want_lse)


@pytest.mark.parametrize("runner", RUNNERS)
def test_columns_of_the_keys_are_dense_attention_over_them(runner: tuple[str, str]) -> None:
    """Without a copy: the gathered sequence is the key tensor itself, a view that is not contiguous."""
    backend, device = runner
    p = make(Case("columns", density=0.0, **SMALL), device)
    pick = torch.rand(1, 2, 1, 75) < 0.3
    bias = torch.zeros(1, 1, 75, device=device)
    p.gathered = gather(pick.expand(-1, -1, 3, -1), p.k, p.v, bias, 1, capacity=3 * 2 * 75)
    got, _ = attend(p, backend)
    want = F.scaled_dot_product_attention(p.q.double(), p.k.double(), p.v.double(), attn_mask=pick.to(device))
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("runner", RUNNERS)
def test_full_graph_compile(runner: tuple[str, str]) -> None:
    backend, device = runner
    p = make(Case("compile", pooled=True, order=True, **SMALL), device)

    def step(q: torch.Tensor, mask: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        more = GatheredKeys(p.k, p.v, bias, *gathered_from_mask(mask), 4)
        out, lse = block_sparse_attention(
            q * 2, p.k, p.v, p.lists, order=p.order, pooled=p.pooled, gathered=more, return_lse=True, backend=backend
        )
        return out.transpose(1, 2).reshape(1, 70, -1) + lse.mean()

    mask = (torch.rand(1, 2, 3, 19) < 0.4).to(device)
    bias = torch.randn(1, 1, 75, device=device)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(p.q, mask, bias), step(p.q, mask, bias), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_custom_op_is_sound(device: str) -> None:
    p = make(Case("opcheck", group=4, **SMALL), device)
    n, g = p.lists, p.gathered
    assert g is not None
    more = (g.k, g.v, g.bias, g.row_start, g.count, g.indices, g.group)
    args = (p.q, p.k, p.v, n.row_start, n.full, None, n.indices, 32, 16, 0.125, *[None] * 10, *more, True, "")
    torch.library.opcheck(_op, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.interpreter
def test_tiles_smaller_than_blocks() -> None:
    from dit_accel_kernels.block_sparse.configs import TileConfig
    from dit_accel_kernels.block_sparse.launch import block_sparse_triton

    p = make(Case("tiles", group=64, extra=150, pooled=True, order=True, dim=24, **SMALL), "cpu")
    for tma in (False, True):
        config = TileConfig(16, 16, 4, 2, tma)
        check(p, *block_sparse_triton(p.q, p.k, p.v, p.lists, scale=24**-0.5, **p.extras(), config=config))


@pytest.mark.gpu
def test_no_second_kernel_for_another_length() -> None:
    """Sequences of other lengths and strides divisible by 16 run what was compiled before."""
    from dit_accel_kernels.block_sparse.triton import block_sparse_fwd_kernel

    seen = set()
    for tokens in (128, 256, 384):
        p = make(Case("lengths", sq=tokens, sk=tokens, group=8, extra=tokens, dtype=torch.bfloat16), "cuda")
        attend(p, "triton")
        cache = block_sparse_fwd_kernel.device_caches[torch.cuda.current_device()][0]
        seen.add(len(cache))
    assert len(seen) == 1


@pytest.mark.parametrize("name", ["k", "bias"])
def test_wrong_dtypes_raise(name: str) -> None:
    p = make(Case("errors", group=8, **SMALL), "cpu")
    assert p.gathered is not None
    p.gathered = replace(p.gathered, **{name: getattr(p.gathered, name).half()})
    with pytest.raises(ValueError, match=rf"gathered.{name} must be torch.float32 .*, got torch.float16"):
        attend(p, "cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group": 3}, r"gathered.group must be one of \(1, 2, 4, .*, got 3"),
        ({"k": torch.zeros(1, 2, 75)}, r"gathered.k must be \[B, H, Se, D\]"),
        ({"k": torch.zeros(1, 2, 0, 64)}, "Se >= 1"),
        ({"v": torch.zeros(1, 2, 74, 64)}, r"gathered.v must be torch.float32 \[1, 2, 75, 64\]"),
        ({"v": torch.zeros(1, 2, 64, 75).mT}, "gathered.v must be contiguous along D"),
        ({"k": torch.zeros(1, 2, 75, 64, device="meta")}, "gathered.k must be on cpu like q, got meta"),
        ({"bias": torch.zeros(1, 75)}, r"gathered.bias must be torch.float32 \[1, 2\|1, 75\]"),
        ({"count": torch.zeros(1, 1, 3).int()}, r"gathered.count must be torch.int32 \[1, 2, 3\]"),
        ({"row_start": torch.zeros(1, 2, 4).int()}, r"gathered.row_start must be torch.int32 \[1, 2\|1, 3\]"),
        ({"indices": torch.zeros(0).int()}, r"gathered.indices must be torch.int32 \[capacity\] and not empty"),
    ],
)
def test_wrong_arguments_raise(change: dict[str, object], message: str) -> None:
    p = make(Case("errors", group=8, **SMALL), "cpu")
    assert p.gathered is not None
    p.gathered = replace(p.gathered, **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        attend(p, "cpu")


@settings(deadline=None, max_examples=40)
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 5), st.integers(1, 40)),
    st.floats(0, 1),
    st.booleans(),
    st.integers(0, 99),
)
def test_rows_hold_the_mask(shape: tuple[int, int, int, int], density: float, packed: bool, seed: int) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density
    capacity = max(1, int(mask.sum())) if packed else None
    start, count, indices = gathered_from_mask(mask, capacity=capacity)
    assert {x.dtype for x in (start, count, indices)} == {torch.int32}
    assert torch.equal(count, mask.sum(-1, dtype=torch.int32))
    for row in range(count.numel()):
        first, n = int(start.flatten()[row]), int(count.flatten()[row])
        wanted = mask.flatten(0, 2)[row].nonzero().flatten().tolist()
        assert indices[first : first + n].tolist() == wanted


def test_a_mask_must_be_one() -> None:
    with pytest.raises(ValueError, match="mask must be bool"):
        gathered_from_mask(torch.zeros(1, 1, 2, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="mask must be bool"):
        gathered_from_mask(torch.zeros(1, 2, 3).bool())
