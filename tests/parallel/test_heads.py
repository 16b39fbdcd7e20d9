"""Plans of some heads are those of all, and heads are dealt out evenly; threads stand for processes."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import dit_accel
from dit_accel.geometry import TokenGeometry
from dit_accel.method import Method
from dit_accel.plan import Plan
from dit_accel.planner import Planner
from dit_accel.presets import get_method
from dit_accel_kernels import attention_lse
from dit_accel_patches.parallel import _stream_lengths
from dit_accel_patches.parallel_exchange import Ranks, Streams, even_counts
from dit_accel_patches.parallel_heads import SharedHeads, dealt, why_not_shared

GEOMETRY = TokenGeometry((4, 6, 8), prefix=5)
HEADS = 5


class Threads(Ranks):
    """Processes that are threads."""

    board: dict[int, Tensor]
    barrier: threading.Barrier

    def join(self, x: Tensor, counts: Sequence[int], dim: int) -> Tensor:
        self.board[self.rank] = x
        self.barrier.wait(20)
        found = torch.cat([self.board[rank] for rank in range(self.size)], dim)
        self.barrier.wait(20)
        return found


def in_threads(work: Callable[[Threads], Any], size: int = 2) -> list[Any]:
    """What each of ``size`` processes returns."""
    board: dict[int, Tensor] = {}
    barrier = threading.Barrier(size)
    results: list[Any] = [None] * size

    def body(rank: int) -> None:
        ranks = Threads(None, rank, size)
        object.__setattr__(ranks, "board", board)
        object.__setattr__(ranks, "barrier", barrier)
        try:
            results[rank] = work(ranks)
        except BaseException as error:
            barrier.abort()
            results[rank] = error

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, threading.BrokenBarrierError):
            raise result
    return results


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    made = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, HEADS, GEOMETRY.tokens, 16, generator=made) for _ in range(3))
    # Heads of different sharpness, so that budgets differ.
    return q * torch.linspace(0.2, 3, HEADS)[None, :, None, None], k, v


def planned(planner: Planner, method: Method, heads: Tensor) -> Plan:
    q, k, v = (x.index_select(1, heads) for x in tensors())
    lse = attention_lse(q, k, scale=None) if method.needs_lse else None
    ctx = planner.context(q, k, v, lse, GEOMETRY, density=method.density_at(0.0), scale=None)
    return planner.plan(ctx)


def data_methods() -> list[str]:
    found = []
    for method in dit_accel.methods():
        if method.plans_from_data and not method.is_dense and not method.static and "learned" not in method.score:
            found.append(method.name)
    return found


def levels(plan: Plan) -> list[Tensor]:
    return [part.mask.levels() for part in plan.parts or (plan,)]


@pytest.mark.parametrize("with_density", [False, True])
@pytest.mark.parametrize("name", data_methods())
def test_every_preset_plans_the_same_with_some_of_the_heads(name: str, with_density: bool) -> None:
    method = get_method(name).replace(block_q=16, block_k=16)
    if with_density:
        if not method.keeps_density:
            pytest.skip("takes no density")
        method = method.replace(density=0.4)
    if why_not_shared(method) is not None:
        pytest.skip("refused, see test_what_compares_heads_is_refused")
    whole = planned(Planner(method), method, torch.arange(HEADS))

    def work(ranks: Threads) -> tuple[Plan, Plan, SharedHeads]:
        share = SharedHeads(ranks, HEADS, torch.device("cpu"))
        plan = planned(share.planner(Planner(method)), method, share.index)
        return plan, share.kept(method, plan, {}), share

    for plan, kept, share in in_threads(work):
        assert torch.allclose(plan.density, whole.density)
        for mine, all_heads in zip(levels(plan), levels(whole), strict=True):
            assert torch.equal(
                mine.expand(-1, len(share.index), -1, -1), share.local(all_heads.expand(-1, HEADS, -1, -1))
            )
        there = kept.placement
        assert isinstance(there, SharedHeads)
        for mine, all_heads in zip(levels(kept), levels(whole), strict=True):
            assert torch.equal(
                mine.expand(-1, len(there.index), -1, -1), there.local(all_heads.expand(-1, HEADS, -1, -1))
            )
        if kept.order is not None and whole.order is not None and not kept.parts:
            assert torch.equal(
                kept.order.table[kept.order.head.long()], whole.order.table[whole.order.head.long()][there.index]
            )


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"score": "proxy", "select": "top_p:0.9"}, "proxy"),
        ({"score": "region"}, "region"),
        ({"score": "stripes", "select": "insisted", "density": 0.3}, "stripes"),
    ],
)
def test_what_compares_heads_is_refused(changes: dict[str, Any], word: str) -> None:
    reason = why_not_shared(Method(name="test", **changes))
    assert reason is not None
    assert word in reason
    assert why_not_shared(Method(name="test")) is None


@pytest.mark.parametrize("parts", [2, 3, 4, 7])
def test_dealing_out_evens_the_work(parts: int) -> None:
    work = torch.tensor([9.0, 1, 1, 1, 8, 1, 1, 1, 7, 1, 2, 3])
    placed = dealt(work, parts)
    assert sorted(placed.tolist()) == list(range(12))
    sums = torch.stack([work[part].sum() for part in placed.split(even_counts(12, parts))])
    plain = torch.stack([part.sum() for part in work.split(even_counts(12, parts))])
    assert sums.max() <= plain.max()
    assert sums.max() - sums.min() <= work.max()


def test_streams_and_their_places() -> None:
    assert _stream_lengths(TokenGeometry((1, 4, 4)), 7) == (16,)  # text that only cross-attention sees
    assert _stream_lengths(TokenGeometry((1, 4, 4), prefix=7, suffix=5), 7) == (7, 21)
    assert _stream_lengths(TokenGeometry((1, 4, 4), suffix=7), 7) == (16, 7)
    assert _stream_lengths(TokenGeometry((1, 4, 4), prefix=7), 0) == (23,)  # joined before it is sharded
    assert "7 text tokens" in str(_stream_lengths(TokenGeometry((1, 4, 4), prefix=3), 7))
    assert "not known" in str(_stream_lengths("no grid", 7))
    streams = Streams(Ranks(None, 1, 2), (7, 21))
    assert streams.chunks == ((4, 3), (11, 10))
    assert (streams.tokens, streams.here) == (28, 13)


def test_a_moved_plan_moves_what_belongs_to_heads() -> None:
    method = get_method("adaspa").replace(block_q=16, block_k=16, density=0.3)

    def work(ranks: Threads) -> Plan:
        share = SharedHeads(ranks, HEADS, torch.device("cpu"))
        plan = planned(share.planner(Planner(method)), method, share.index)
        plan = dataclasses.replace(plan, lse=share.index[None, :, None].float(), seen_bits=plan.mask.bits)
        return share.kept(method, plan, {})

    for kept in in_threads(work):
        there = kept.placement
        assert isinstance(there, SharedHeads)
        assert kept.lse is not None
        assert kept.seen_bits is not None
        assert torch.equal(kept.lse[0, :, 0].long(), there.index)
        assert torch.equal(kept.seen_bits, kept.mask.bits)
