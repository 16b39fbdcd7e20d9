"""Orders of jobs that are kept with lists: when they are made, found and forgotten, and on a Hopper GPU what they give."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_accel_kernels import _launch
from dit_accel_kernels.block_sparse import hopper_call, hopper_kept
from dit_accel_kernels.block_sparse.hopper_call import Jobs, jobs_of
from dit_accel_kernels.block_sparse.hopper_kept import forget_orders, order_of_jobs, order_that_stays
from dit_accel_kernels.block_sparse.hopper_launch import block_sparse_hopper
from dit_accel_kernels.block_sparse.hopper_specs import hopper_config
from dit_accel_kernels.block_sparse.reference import block_sparse_reference
from dit_accel_kernels.lists import lists_from_levels
from dit_accel_kernels.types import BlockLists
from tests.kernels.groups import run_in_a_process

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
HEADS, TOKENS = 6, 20 * 128 * 2


class Faked:
    """Streams, captures and launches of a GPU that is not there."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.stream, self.capturing, self.sorted = 0, False, 0
        patch.setattr(hopper_kept, "_current_stream", lambda index: self.stream)
        patch.setattr(hopper_kept, "_capturing", lambda: self.capturing)
        patch.setattr(hopper_kept, "launch", lambda kernel, grid: self._sort)
        patch.setattr(hopper_call, "multiprocessors", lambda device: 132)
        patch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())

    def _sort(self, *args: Any, **options: Any) -> None:
        self.sorted += 1


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Faked]:
    pytest.importorskip("triton")
    yield Faked(monkeypatch)
    forget_orders()


def some_lists(seed: int = 0) -> BlockLists:
    gen = torch.Generator().manual_seed(seed)
    return lists_from_levels((torch.rand(1, HEADS, 40, 40, generator=gen) < 0.3).to(torch.uint8), 128, 128)


def jobs(heads: int = HEADS) -> Jobs:
    return jobs_of(torch.empty(1, heads, TOKENS, 128), hopper_config(128))


def order(lists: BlockLists, wanted: Jobs | None = None) -> Tensor:
    return order_of_jobs(lists, wanted or jobs(), torch.empty(4, dtype=torch.int32))[0]


def test_only_the_first_call_with_given_lists_sorts(gpu: Faked) -> None:
    lists = some_lists()
    first, known = order_of_jobs(lists, jobs(), torch.empty(4, dtype=torch.int32))
    assert first.numel() == 40 * HEADS - 132
    assert not known
    again, known = order_of_jobs(lists, jobs(), torch.empty(4, dtype=torch.int32))
    assert again is first
    assert known
    # The same tensors in other lists, as after the way through an operator of torch.
    assert order(replace(lists)) is first
    assert gpu.sorted == 1


def test_what_decides_about_an_order_is_told_apart(gpu: Faked) -> None:
    lists = some_lists()
    orders = [order(lists), order(replace(lists, partial=None)), order(lists, jobs(7)), order(some_lists(1))]
    gpu.stream = 5  # whose launches may overtake those of the first
    orders.append(order(lists))
    assert len({id(x) for x in orders}) == gpu.sorted == 5
    gpu.stream = 0
    assert order(lists) is orders[0]


def test_few_jobs_need_no_order(gpu: Faked) -> None:
    lists = some_lists()
    counter = torch.empty(4, dtype=torch.int32)
    found, known = order_of_jobs(lists, jobs(3), counter)  # 120 jobs of 132 programs
    assert found is counter
    assert known
    assert order_that_stays(torch.empty(1, 3, TOKENS, 128), lists) is None
    assert gpu.sorted == 0


def test_lists_that_are_changed_are_sorted_again(gpu: Faked) -> None:
    lists = some_lists()
    first = order(lists)
    lists.full.sub_(1).clamp_(min=0)
    second = order(lists)
    assert second is not first
    assert order(lists) is second
    assert lists.partial is not None
    lists.partial.add_(0)
    assert order(lists) is not second
    assert gpu.sorted == 3


def test_inference_tensors_keep_an_order_too(gpu: Faked) -> None:
    with torch.inference_mode():
        lists = some_lists()
        first = order(lists)
        lists.full.add_(1)  # nobody counts this; the order is still one of all jobs
        assert order(lists) is first


def test_orders_die_with_their_lists_and_copies_have_none(gpu: Faked) -> None:
    lists = some_lists()
    before = len(hopper_kept._kept)
    first = order(lists)
    copied = copy.deepcopy(lists)
    file = io.BytesIO()
    torch.save(vars(lists), file)
    file.seek(0)
    loaded = BlockLists(**torch.load(file, weights_only=True))
    for other in (copied, loaded):
        assert order(other) is not first
    assert len(hopper_kept._kept) == before + 3
    del lists, copied, loaded, other
    gc.collect()
    assert len(hopper_kept._kept) == before


def test_a_tensor_keeps_a_bounded_number_of_orders(gpu: Faked) -> None:
    lists = some_lists()
    for gpu.stream in range(100):
        order(lists)
    assert len(hopper_kept._kept[lists.full].made) <= 8


def test_a_capture_uses_what_was_made_before_it_and_keeps_nothing(gpu: Faked) -> None:
    lists = some_lists()
    gpu.stream, gpu.capturing = 1, True
    assert order(lists) is not order(lists)  # computed at replay: nobody else may count on it
    gpu.stream, gpu.capturing = 0, False
    first = order(lists)
    assert gpu.sorted == 3
    gpu.stream, gpu.capturing = 1, True
    assert order(lists) is first
    assert gpu.sorted == 3
    # The graph has its address: it lives as long as the lists, even if they are changed or orders forgotten.
    gpu.stream, gpu.capturing = 0, False
    lists.full.add_(1)
    assert order(lists) is not first
    forget_orders()
    assert any(x is first for x in hopper_kept._kept[lists.full].pinned)


def test_a_recording_uses_what_stays_only(gpu: Faked, monkeypatch: pytest.MonkeyPatch) -> None:
    lists, q = some_lists(), torch.empty(1, HEADS, TOKENS, 128)
    first = order(lists)
    monkeypatch.setattr(_launch.here, "recording", object(), raising=False)
    assert order(lists) is not first  # of another recording's tensors nobody knows how long they live
    monkeypatch.setattr(_launch.here, "recording", None)
    stays = order_that_stays(q, lists)
    assert stays is first
    monkeypatch.setattr(_launch.here, "recording", object())
    assert order(lists) is first
    lists.full.add_(1)
    assert order(lists) is first
    assert gpu.sorted == 2


def run_streams_and_graphs() -> None:
    """The same lists on two streams at once and in two graphs, with and without the kernel for short lists."""
    gen = torch.Generator("cuda").manual_seed(0)
    for dim, short in ((128, 0.0), (128, 1e9), (64, 0.0)):
        q, k, v = (torch.randn(1, 12, 4608, dim, device="cuda", generator=gen).bfloat16() for _ in range(3))
        keep = torch.empty(1, 12, 36, 1, device="cuda").exponential_(generator=gen) * 4
        levels = torch.rand(1, 12, 36, 36, device="cuda", generator=gen).argsort(-1) < keep.round().clamp(1, 36)
        lists = replace(lists_from_levels(levels.to(torch.uint8), 128, 128), partial=None)
        config = replace(hopper_config(dim), short_tiles=short)
        want, _ = block_sparse_reference(q.float(), k.float(), v.float(), lists, scale=dim**-0.5)

        def call() -> Tensor:
            return block_sparse_hopper(q, k, v, lists, scale=dim**-0.5, config=config)[0]  # noqa: B023

        first = call()
        assert ((first.float() - want).norm() / want.norm()).item() < 6e-3
        streams = [torch.cuda.Stream() for _ in range(3)]
        torch.cuda.synchronize()
        graphs, results = [], []
        for stream in streams[:2]:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                results.append([call() for _ in range(3)])
            graphs.append(graph)
        made = []
        for turn in range(40):
            for graph, stream in zip(graphs, streams):
                with torch.cuda.stream(stream):
                    graph.replay()
            with torch.cuda.stream(streams[2]):
                made.append(call())
            made.append(call())
            if turn == 20:
                torch.cuda.synchronize()
                lists.full.add_(
                    0
                )  # as if it had been changed: sorted again, while graphs go on with the order they know
        torch.cuda.synchronize()
        for x in made + results[0] + results[1]:
            assert torch.equal(x, first)
        sys.stdout.write(f"head size {dim}, short {short}: {len(made)} calls\n")


@pytest.mark.gpu
@pytest.mark.skipif(not IS_HOPPER, reason="needs a GPU of compute capability 9.0")
def test_streams_and_graphs_share_nothing_that_is_written() -> None:
    passed, said = run_in_a_process(__file__, limit=90.0)
    assert passed, said


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True, warn_only=True)
    run_streams_and_graphs()
