"""The Hopper form of the correction at mean queries: how work is shared out, and how segments are put together.

The Gluon kernel cannot be interpreted. A stand-in in torch leaves what it leaves for each segment; on a GPU it runs itself.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_accel_kernels.lists import unpack_bits
from dit_accel_kernels.query_means import hopper_launch, mean_queries, mean_query_residual
from dit_accel_kernels.query_means.hopper_launch import residual_hopper, share_out
from dit_accel_kernels.query_means.hopper_specs import MeansConfig
from dit_accel_kernels.query_means.reference import residual_reference
from dit_accel_kernels.types import Pooled, TokenOrder
from tests.kernels.interpreter import repair
from tests.kernels.test_query_means import made

pytest.importorskip("triton")


@pytest.mark.parametrize("row_tiles", [1, 2, 3, 5, 10, 31, 48, 200])
@pytest.mark.parametrize("work", [1, 7, 1728, 47280])
def test_work_is_shared_out_to_all_programs(row_tiles: int, work: int) -> None:
    members, groups = share_out(row_tiles, work, 132)
    assert 1 <= members * groups <= 132
    turns, share = -(-row_tiles // members), -(-work // groups)
    assert members * turns >= row_tiles
    assert groups * share >= work
    if work > 1000:
        assert turns * share <= 1.25 * row_tiles * work / 132


class _StandIn:
    """Writes sums and accumulators of each segment, as :mod:`dit_accel_kernels.query_means.hopper` says.

    The fast pass takes the maximum of the last tile for that of all, and leaves every third segment to be done again.
    """

    def __getitem__(self, grid: tuple[int]) -> Any:
        self.programs = grid[0]
        return self

    def __call__(
        self, means: Tensor, key: Tensor, value: Tensor, bits: Tensor, sums: Tensor, accs: Tensor, flags: Tensor,
        scale2: float, heads: int, rows: int, sk: int, words: int, bits_b: int, bits_h: int,
        row_tiles: int, members: int, share: int, total: int, tiles: int, **options: Any,
    ) -> None:  # fmt: skip
        if not options["RETRY"]:
            sums.fill_(float("nan"))
            accs.fill_(float("nan"))
        tile_rows = sums.shape[2]
        seen = unpack_bits(bits, -(-sk // options["BLOCK_K"])).bool().expand(*means.shape[:2], rows, -1)
        for pid in range(self.programs):
            member, group = pid % members, pid // members
            for i_row in range(member, row_tiles, members):
                position, end = group * share, min(group * share + share, total)
                while position < end:
                    plane, first = position // tiles, position % tiles
                    count = min(tiles - first, end - position)
                    keys = slice(first * 64, min((first + count) * 64, sk))
                    mine = slice(i_row * tile_rows, min((i_row + 1) * tile_rows, rows))
                    b, h = plane // heads, plane % heads
                    logits = means[b, h, mine].float() @ key[b, h, keys].float().mT * scale2
                    last = logits[:, (count - 1) * 64 :] if options["FAST"] else logits
                    top = last.amax(-1)
                    weights = torch.exp2(logits - top[:, None])
                    kept = weights * seen[b, h, mine].repeat_interleave(options["BLOCK_K"], -1)[:, keys]
                    slot, n = (group + plane) * row_tiles + i_row, logits.shape[0]
                    position += count
                    if options["RETRY"] and not flags[slot].any():
                        continue
                    assert sums[slot].isnan().all()  # nobody else writes here
                    if options["FAST"]:
                        again = slot % 3 == 0 or not (weights.sum(-1) < 1.2e30).all()
                        flags[slot] = 0
                        flags[slot, -1] = int(again)
                        if again:
                            continue
                    sums[slot], accs[slot] = 0, 0
                    sums[slot, :, :n] = torch.stack([top, weights.sum(-1), kept.sum(-1)])
                    for i, part in enumerate((weights, kept)):
                        accs[slot, i, :n, : value.shape[3]] = part @ value[b, h, keys].float()


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("dtype", "tolerance", "tokens", "dim", "blocks", "programs", "warpgroups"),
    [
        pytest.param(torch.bfloat16, 1e-2, 700, 64, (8, 64), 7, 1, id="bf16-done-again"),
        pytest.param(torch.float16, 4e-3, 500, 64, (8, 128), 7, 1, id="fp16"),
        pytest.param(torch.float32, 2e-5, 450, 72, (4, 128), 3, 2, id="d72-wide-keys"),
        pytest.param(torch.float32, 2e-5, 300, 16, (64, 64), 132, 3, id="more-programs-than-work"),
    ],
)
def test_segments_are_put_together(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    tolerance: float,
    tokens: int,
    dim: int,
    blocks: tuple[int, int],
    programs: int,
    warpgroups: int,
) -> None:
    repair()
    from dit_accel_kernels.query_means import hopper

    tensors, pooled, *_ = made(dtype, tokens, dim, *blocks, masked=False, ordered=False, share=0.4)
    means = tensors[0][:, :, :: blocks[0]].contiguous()
    if dtype == torch.float16:  # pooled keys have the largest weights, which must stay within its range
        means, pooled = means * 0.5, replace(pooled, k=torch.randn_like(pooled.k))
    monkeypatch.setattr(hopper, "query_means_hopper_kernel", _StandIn())
    monkeypatch.setattr(hopper_launch, "make_descriptor", lambda x, *_: x)
    monkeypatch.setattr(hopper_launch, "multiprocessors", lambda _: programs)
    config = MeansConfig(warpgroups, stages=2, consumer_regs=0, loader_regs=0, overlap=True)
    got = residual_hopper(means, tensors[1], tensors[2], pooled, blocks[1], dim**-0.5, config)
    want = residual_reference(means, tensors[1], tensors[2], pooled, None, blocks[1], dim**-0.5)
    torch.testing.assert_close(got, want, atol=tolerance, rtol=1e-3)
    assert want.abs().max() > 0.05


@pytest.mark.interpreter
def test_what_is_kept_far_below_the_maximum_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A segment whose first tile lies low has a sum of up to 2^100, and may still hold all that counts of what is kept."""
    repair()
    from dit_accel_kernels.query_means import hopper

    (query, key, value), pooled, *_ = made(torch.bfloat16, 4609, 128, 16, 128, masked=False, ordered=False, share=0.3)
    means = mean_queries(30.0 * query, block_q=16)[1:, 1:]
    key, value, bias = key[1:, 1:], value[1:, 1:], pooled.bias
    pooled = Pooled(pooled.k[1:, 1:], pooled.v[1:, 1:], bias, pooled.bits[1:, 1:])
    monkeypatch.setattr(hopper, "query_means_hopper_kernel", _StandIn())
    monkeypatch.setattr(hopper_launch, "make_descriptor", lambda x, *_: x)
    monkeypatch.setattr(hopper_launch, "multiprocessors", lambda _: 30)
    got = residual_hopper(means, key, value, pooled, 128, 128**-0.5)
    want = residual_reference(means, key, value, pooled, None, 128, 128**-0.5)
    rows = hopper_launch.defined_rows(means, key, pooled, 128, 128**-0.5)
    assert (got.float() - want)[rows].norm() <= 0.02 * want.float().norm()


def test_what_it_cannot_serve_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    (query, key, value), *_ = made(torch.bfloat16, 100, 32, 32, 64, masked=False, ordered=False, share=0.4)
    assert "9.0" in str(hopper_launch.why_not_hopper(query, key, value, None, 64))
    monkeypatch.setattr(hopper_launch, "capability", lambda _: 90)
    monkeypatch.setattr(hopper_launch, "has_gluon", lambda: True)
    ask = hopper_launch.why_not_hopper
    assert ask(query, key, value, None, 64) is None
    assert "mask" in str(ask(query, key, value, torch.ones(2, 100, dtype=torch.bool), 64))
    assert "block_k" in str(ask(query, key, value, None, 32))
    assert "dtype" in str(ask(query.float(), key, value, None, 64))
    odd = torch.zeros(2, 2, 100, 33, dtype=torch.bfloat16)[..., :32]
    assert "key must have" in str(ask(query, odd, value, None, 64))
    assert "value must have" in str(ask(query, key, odd, None, 64))


GPU_CASES = [
    pytest.param(torch.bfloat16, 1100, 128, (64, 64), True, id="bf16"),
    pytest.param(torch.bfloat16, 4609, 128, (16, 128), False, id="three-row-tiles"),
    pytest.param(torch.float16, 700, 96, (128, 64), True, id="fp16-d96"),
    pytest.param(torch.bfloat16, 2000, 64, (16, 64), True, id="d64"),
    pytest.param(torch.float16, 131, 72, (64, 128), False, id="fewer-than-a-tile"),
    pytest.param(torch.bfloat16, 63, 40, (64, 64), False, id="one-ragged-block"),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tokens", "dim", "blocks", "ordered"), GPU_CASES)
# Loud logits differ so much that bfloat16 must do segments again.
@pytest.mark.parametrize("loud", [1.0, 30.0])
def test_on_a_gpu_it_equals_the_reference(
    dtype: torch.dtype, tokens: int, dim: int, blocks: tuple[int, int], ordered: bool, loud: float
) -> None:
    (query, key, value), pooled, _, _, order = made(
        dtype, tokens, dim, *blocks, masked=False, ordered=ordered, share=0.3
    )
    pooled = Pooled(*(x.cuda() for x in (pooled.k, pooled.v, pooled.bias, pooled.bits)))
    order = None if order is None else TokenOrder(order.table.cuda(), order.head.cuda())
    query = (loud * query).cuda()
    if hopper_launch.why_not_hopper(query, key.cuda(), value.cuda(), None, blocks[1]) is not None:
        pytest.skip("needs a Hopper GPU")
    # What lies around keys and values is not a number: a read beyond them would show.
    around = [torch.full((2, 2, tokens + 200, dim), float("nan"), dtype=dtype, device="cuda") for _ in range(2)]
    for wide, x in zip(around, (key, value), strict=True):
        wide[:, :, 100:-100] = x.cuda()
    key, value = (x[:, :, 100:-100] for x in around)
    means = mean_queries(query, order=order, block_q=blocks[0])
    got = residual_hopper(means, key, value, pooled, blocks[1], dim**-0.5)
    wide_pool = Pooled(pooled.k.double(), pooled.v.double(), pooled.bias, pooled.bits)
    want = residual_reference(means, key, value, wide_pool, None, blocks[1], dim**-0.5).float()
    rows = hopper_launch.defined_rows(means, key, pooled, blocks[1], dim**-0.5)
    assert rows.any()
    assert (got.float() - want)[rows].norm() <= 0.02 * want.norm() + 1e-5
    options: dict[str, Any] = {"order": order, "block_q": blocks[0], "block_k": blocks[1], "scale": dim**-0.5}
    whole = mean_query_residual(query, key, value, pooled, backend="hopper", **options)
    assert torch.equal(whole, got)
    query[0, 1, 5] = float("nan")
    one = mean_query_residual(query, key, value, pooled, backend="hopper", **options)
    assert one.isfinite().all()
    assert torch.equal(one[1], got[1])


@pytest.mark.gpu
def test_the_self_test_passes_on_a_hopper_gpu() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    for dtype in (torch.bfloat16, torch.float16):
        for dim, block_k in ((128, 64), (64, 128)):
            assert hopper_launch.self_test(torch.device("cuda", 0), dtype, dim, block_k) is None


def test_the_self_test_tells_right_from_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounded(means: Tensor, key: Tensor, value: Tensor, pooled: Pooled, block_k: int, scale: float) -> Tensor:
        return residual_reference(means, key, value, pooled, None, block_k, scale)

    def one_segment_off(means: Tensor, *rest: Any) -> Tensor:
        got = rounded(means, *rest)
        got[0, 1, 64:128] = 0  # as if what had to be done again were not
        return got

    cpu = torch.device("cpu")
    monkeypatch.setattr(hopper_launch, "residual_hopper", rounded)
    assert hopper_launch._error(cpu, torch.bfloat16, 64, 128) < 0.01
    monkeypatch.setattr(hopper_launch, "residual_hopper", one_segment_off)
    assert hopper_launch._error(cpu, torch.bfloat16, 64, 128) > 0.1


def test_a_failed_self_test_is_said_and_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def wrong(*args: Any) -> float:
        calls.append(args)
        return 0.5

    monkeypatch.setattr(hopper_launch, "_tested", {})
    monkeypatch.setattr(hopper_launch, "_error", wrong)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.warns(UserWarning, match="correction at mean queries is off: .* by 0.5"):
        reason = hopper_launch.self_test(torch.device("cpu"), torch.bfloat16, 128, 64)
    assert reason == hopper_launch.self_test(torch.device("cpu"), torch.bfloat16, 96, 64)
    assert len(calls) == 1
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "captured" in str(hopper_launch.self_test(torch.device("cpu"), torch.float16, 128, 64))
