"""What the stress test leans on, in Triton's interpreter and on a CPU: groups of heads, near windows, sampled masses."""

from __future__ import annotations

import itertools

import pytest
import torch

from dit_accel_kernels import attention_lse, block_mass, dense
from dit_accel_kernels.block_mass.hopper_launch import split_keys
from dit_accel_kernels.block_sparse.hopper_specs import hopper_config
from dit_accel_kernels.block_sparse.near import PackedWindows, packed_windows, window_bits
from dit_accel_kernels.types import TokenOrder, TokenWindows
from tests.kernels.interpreter import repair
from tests.kernels.problems import Case, Problem, check, make


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("shape", "partial", "first", "span"),
    [((2, 3), False, 0, 520), ((1, 3), True, 0, 260), ((2, 1), True, 300, 700), ((2, 3), True, 0, 5000)],
)
def test_jobs_are_sorted_within_groups_counted_from_the_end(
    shape: tuple[int, int], partial: bool, first: int, span: int
) -> None:
    repair()
    from dit_accel_kernels.block_sparse.hopper_schedule import BLOCK, OTHERS, longest_first_kernel

    batch, heads, qb = 2, 3, 260
    gen = torch.Generator().manual_seed(span)
    full, more = (torch.randint(0, 9, (*shape, qb), generator=gen, dtype=torch.int32) for _ in range(2))
    jobs = batch * heads * qb
    order, counter = torch.full((jobs - first,), -1, dtype=torch.int32), torch.full((1,), 7, dtype=torch.int32)
    strides = [s if n > 1 else 0 for n, s in zip(shape, full.stride()[:2])]
    longest_first_kernel[(-(-(jobs - first) // BLOCK),)](
        full, more if partial else None, order, counter, first, jobs, qb, heads, *strides,
        HAS_PARTIAL=partial, BLOCK=BLOCK, OTHERS=OTHERS, span=span,
    )  # fmt: skip
    length = (full + more if partial else full).expand(batch, heads, qb).flatten()
    ends = sorted({max(jobs - i * span, first) for i in range(jobs // span + 2)})
    want: list[int] = []
    for a, b in itertools.pairwise(ends):
        want += (length[a:b].argsort(descending=True, stable=True) + a).tolist()
    assert order.tolist() == want
    assert counter.item() == 0


def test_narrow_heads_are_sorted_in_larger_groups() -> None:
    assert (hopper_config(128).sorted_rounds, hopper_config(72).sorted_rounds, hopper_config(64).sorted_rounds) == (
        4,
        4,
        8,
    )


def near(p: Problem, tile: int, reach: int) -> None:
    """Give a problem windows whose codes rise by 5 from tile to tile and differ by ``reach`` within one."""
    gen = torch.Generator().manual_seed(1)
    sq, sk = p.q.shape[2], p.k.shape[2]
    code = torch.randint(0, reach, (3, sk), generator=gen, dtype=torch.int32)
    code[:, ::tile], code[:, 1::tile] = 0, reach - 1
    code += (torch.arange(sk) // tile * 5).int()
    code[0, 2:][torch.rand(sk - 2, generator=gen) < 0.1] = -1
    code[0, 1::tile] = (torch.arange(1, sk, tile) // tile * 5 + reach - 1).int()
    code[0, ::tile] = (torch.arange(0, sk, tile) // tile * 5).int()
    lo = torch.randint(-3, 12, (3, sq), generator=gen, dtype=torch.int32)
    hi = lo + torch.randint(-1, 14, (3, sq), generator=gen, dtype=torch.int32)
    p.windows = TokenWindows(lo, hi, code)


@pytest.mark.interpreter
@pytest.mark.parametrize(("reach", "fits"), [(10, True), (12, False)])
@pytest.mark.parametrize("order", [False, True])
def test_near_windows_are_those_of_the_oracle(reach: int, fits: bool, order: bool) -> None:
    repair()
    from dit_accel_kernels.block_sparse.launch import block_sparse_triton

    p = make(Case("near", sq=100, sk=180, windows=True, density=0.9, order=order, pooled=order), "cpu")
    near(p, 64, reach)
    assert p.windows is not None
    assert (window_bits(p.windows.k_code, 64) is not None) is fits
    check(p, *block_sparse_triton(p.q, p.k, p.v, p.lists, scale=64**-0.5, **p.extras()))


def _sees(packed: PackedWindows, i: int, j: int, tile: int) -> bool:
    """Whether query ``i`` sees key ``j``, from packed words alone, as a kernel finds it."""
    lo, hi, base = (int(x) for x in (packed.q_lo[i], packed.q_hi[i], packed.k_base[j // tile]))
    seen = 0
    for shift in (0, 10, 20):
        low, high = ((x >> shift) % 1024 - (base >> shift) % 1024 for x in (lo, hi))
        seen |= (((1 << min(max(high, 0), 10)) - 1) & -(1 << min(max(low, 0), 10))) << shift
    return int(packed.k_bits[j]) & ~seen == 0


@pytest.mark.parametrize("least", [0, 40, -3])
def test_packed_windows_say_who_sees_whom(least: int) -> None:
    gen = torch.Generator().manual_seed(0)
    code = torch.randint(1, 900, (3, 6), generator=gen).repeat_interleave(8, 1)
    code = (code + torch.randint(0, 10, code.shape, generator=gen)).int()
    code[:, 20:22] = 1022
    code[:, 16:20] = 1015
    code[:, 22:24] = 1018
    code[:, 0] = 0
    code[:, 1:8] = torch.randint(0, 10, (3, 7), generator=gen)
    code[1:] += least  # only the first axis says by a negative code that everybody sees a key
    code[:, 5] = -1
    middle = code[:, torch.randint(0, 48, (30,), generator=gen)]
    lo, hi = ((middle + torch.randint(-6, 4, (3, 30), generator=gen)).int(), (middle + 5).int())
    lo[:, 0], hi[:, 0], lo[:, 1], hi[:, 1] = -50, 5000, 4000, 5000
    lo[:, 2] = least - 3
    windows = TokenWindows(lo, hi, code)
    packed = packed_windows(windows, 8)
    assert packed is not None
    assert packed_windows(windows, 8) is packed
    inside = ((lo[:, :, None] <= code[:, None]) & (code[:, None] < hi[:, :, None])).all(0) | (code[0] < 0)
    assert 0.05 < inside.float().mean() < 0.5
    assert [[_sees(packed, i, j, 8) for j in range(48)] for i in range(30)] == inside.tolist()
    hi += 1  # changed in place: packed again
    assert packed_windows(windows, 8) is not packed
    code[:, 16:24] = 1023 + max(least, 0)
    assert packed_windows(windows, 8) is None
    code[:, 16:24] = 1022
    code[:, 21] = 500
    assert packed_windows(windows, 8) is None


def test_bits_are_those_of_the_codes_and_kept() -> None:
    code = torch.stack([torch.arange(64) // 8, torch.arange(64) % 8 + 100, torch.full((64,), 7)]).int()
    found = window_bits(code, 16)
    assert found is not None
    bits, base = found
    assert base.tolist() == [[0, 2, 4, 6], [100] * 4, [7] * 4]
    assert bits[0] == 1 | 1 << 10 | 1 << 20
    assert bits[15] == 1 << 1 | 1 << 17 | 1 << 20
    assert bits.tolist() == bits[:16].tolist() * 4
    assert window_bits(code, 16) is found
    code[0, 3] = 40  # changed in place: looked at again
    assert window_bits(code, 16) is None
    assert window_bits(code, 1) is not None
    code[0, 3] = -1  # seen by everybody, wherever it is
    again = window_bits(code, 16)
    assert again is not None
    assert again[0][3] == 0
    assert window_bits(torch.full((3, 5), -1, dtype=torch.int32), 64)[0].tolist() == [0] * 5  # type: ignore[index]


@pytest.mark.parametrize("backend", ["cpu", "reference", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_a_sampled_mass_is_that_of_the_sampled_queries(backend: str) -> None:
    repair()
    gen = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, n, 32, generator=gen) for n in (200, 150))
    order = TokenOrder(
        torch.stack([torch.randperm(200, generator=gen) for _ in range(2)]).int(), torch.tensor([0, 1, 1]).int()
    )
    lse = attention_lse(q, k, backend="reference")
    got = block_mass(q, k, lse, block_q=64, block_k=32, sample=16, order=order, backend=backend)
    table = order.table[order.head.long()].long()[:, ::4]  # every fourth of a block of 64
    some_q, some_lse = (
        q.gather(2, table[None, :, :, None].expand(2, -1, -1, 32)),
        lse.gather(2, table[None].expand(2, -1, -1)),
    )
    want = block_mass(some_q, k, some_lse, block_q=16, block_k=32, backend="reference")
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(got.sum(-1), torch.ones(2, 3, 4))


def test_a_sample_must_divide_the_block() -> None:
    q = torch.randn(1, 1, 64, 16)
    with pytest.raises(ValueError, match="sample must divide block_q=64, got 24"):
        block_mass(q, q, attention_lse(q, q), block_q=64, block_k=64, sample=24)
    with pytest.raises(ValueError, match="backend='hopper' cannot run: device must be an NVIDIA GPU"):
        block_mass(q, q, attention_lse(q, q), block_q=64, block_k=64, backend="hopper")


@pytest.mark.parametrize(("row_jobs", "tiles"), [(1536, 256), (12, 256), (192, 591), (1, 1), (3, 7), (11840, 592)])
def test_keys_are_split_such_that_programs_end_together(row_jobs: int, tiles: int) -> None:
    programs = 132
    chunk = split_keys(row_jobs, tiles, programs)
    assert chunk % 2 == 0
    assert 2 <= chunk <= tiles + 1
    jobs = row_jobs * -(-tiles // chunk)
    # Rounds times tiles, against the work that there is: at most a quarter more where there is enough to share out.
    if row_jobs * tiles > 40 * programs:
        assert -(-jobs // programs) * chunk <= 1.25 * row_jobs * tiles / programs + 2


def test_a_dense_pass_lists_every_block() -> None:
    q, k = torch.randn(1, 2, 300, 64), torch.randn(1, 2, 520, 64)
    lists = dense._every_block(q, k)
    assert lists.row_start.tolist() == [[[0, 0, 0]]]
    assert lists.full.tolist() == [[[5, 5, 5]]]
    assert lists.indices.tolist() == [0, 1, 2, 3, 4]
