"""Launches made again are those that the usual way makes: all that Triton's launcher in C gets is compared."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_accel_kernels import replay
from dit_accel_kernels._launch import is_recording, launch
from dit_accel_kernels.recording import Recording
from dit_accel_kernels.replay import Replays
from tests.kernels.launches import REASON, Log, same_form, watched

# Poison is written by an operation of torch, which no recording lets pass.
pytestmark = [pytest.mark.skipif(REASON is not None, reason=str(REASON)), pytest.mark.no_poison]

HEADS, TOKENS, DIM = 4, 96, 64
Result = tuple[Tensor, Tensor | None]


@pytest.fixture
def log() -> Iterator[Log]:
    with watched() as found:
        yield found


class Moved:
    """Moves tokens twice through a tensor that nobody sees; counts how often its Python runs."""

    def __init__(self) -> None:
        self.table = torch.arange(TOKENS, dtype=torch.int32).flip(0)[None].contiguous()
        self.head = torch.zeros(HEADS, dtype=torch.int32)
        self.runs = 0
        self.between: Callable[[Tensor], Any] = lambda x: x

    def __call__(self, x: Tensor) -> Result:
        from dit_accel_kernels.permute.triton import permute_triton

        self.runs += 1
        seen = self.between(permute_triton(x, self.table, self.head, False))
        return permute_triton(x if seen is None else seen, self.table, self.head, True), None

    @property
    def replays(self) -> Replays:
        return Replays([self.table, self.head], "moved")


def tensor(layout: str = "bhsd", dtype: torch.dtype = torch.bfloat16) -> Tensor:
    if layout == "bhsd":
        return torch.randn(1, HEADS, TOKENS, DIM).to(dtype)
    if layout == "bshd":
        return torch.randn(1, TOKENS, HEADS, DIM).to(dtype).transpose(1, 2)
    if layout == "odd":  # 2 bytes beside an address that Triton would take for aligned
        return torch.randn(1 + HEADS * TOKENS * DIM).to(dtype)[1:].view(1, HEADS, TOKENS, DIM)
    fused = torch.randn(1, TOKENS, 3, HEADS, DIM).to(dtype)
    return fused[:, :, 1].transpose(1, 2)


def layout(x: Tensor) -> Any:
    return x.shape, x.stride(), x.dtype


def both_ways(moved: Moved, replays: Replays, x: Tensor, log: Log) -> tuple[Log, Log]:
    log.clear()
    moved(x)
    usual = same_form(log, x, moved.table, moved.head)
    log.clear()
    replays(moved, (x,), layout(x))
    return usual, same_form(log, x, moved.table, moved.head)


def test_python_is_left_out_and_launches_stay(log: Log) -> None:
    moved = Moved()
    replays = moved.replays
    for x in (tensor(), tensor(), tensor()):
        usual, again = both_ways(moved, replays, x, log)
        assert len(usual) == 2
        assert again == usual
    assert moved.runs == 3 + 1  # the usual way each time, and the call that was recorded


def test_results_are_those_of_the_usual_way_in_shape_and_layout(log: Log) -> None:
    moved = Moved()
    replays = moved.replays
    found = [replays(moved, (x,), layout(x))[0] for x in (tensor("bshd"), tensor("bshd"))]
    assert found[0].shape == found[1].shape
    assert found[0].stride() == found[1].stride()
    assert found[0].dtype == found[1].dtype
    assert found[0].data_ptr() != found[1].data_ptr()
    assert found[1].data_ptr() in log[-1]


@pytest.mark.parametrize("change", ["bshd", "fused", "float16", "float32"])
def test_another_layout_is_recorded_for_itself(log: Log, change: str) -> None:
    moved = Moved()
    replays = moved.replays
    both_ways(moved, replays, tensor(), log)
    dtype = getattr(torch, change, torch.bfloat16)
    for x in (tensor(change if dtype == torch.bfloat16 else "bhsd", dtype) for _ in range(3)):
        usual, again = both_ways(moved, replays, x, log)
        assert again == usual
    assert moved.runs == 4 + 2
    usual, again = both_ways(moved, replays, tensor(), log)
    assert again == usual
    assert moved.runs == 5 + 2


def test_odd_addresses_go_the_usual_way(log: Log) -> None:
    moved = Moved()
    replays = moved.replays
    for x in (tensor(), tensor("odd"), tensor("odd"), tensor()):
        usual, again = both_ways(moved, replays, x, log)
        assert again == usual
    assert moved.runs == 4 + 1 + 2


def test_the_device_of_the_tensors_is_made_current(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    moved, entered = Moved(), []
    replays = moved.replays
    both_ways(moved, replays, tensor(), log)

    @contextlib.contextmanager
    def device(index: int) -> Iterator[None]:
        entered.append((index, len(log)))
        yield
        entered.append((index, len(log)))

    monkeypatch.setattr(replay, "_current_device", lambda: 1)
    monkeypatch.setattr("torch.cuda.device", device)
    log.clear()
    replays(moved, (x := tensor(),), layout(x))
    assert entered == [(0, 0), (0, 2)]
    assert moved.runs == 2


def test_the_stream_of_the_call_is_used(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    moved, x = Moved(), tensor()
    replays = moved.replays
    replays(moved, (x,), layout(x))
    for stream in (7, 9, 7):
        monkeypatch.setattr(replay, "_current_stream", lambda index, found=stream: found)
        log.clear()
        replays(moved, (x,), layout(x))
        assert [entry[3] for entry in log] == [stream, stream]


def test_a_profiler_that_waits_for_launches_sees_them(log: Log) -> None:
    from triton import knobs

    moved, x = Moved(), tensor()
    replays = moved.replays
    replays(moved, (x,), layout(x))
    told: list[Any] = []
    knobs.runtime.launch_enter_hook.add(told.append)
    try:
        replays(moved, (x,), layout(x))
    finally:
        knobs.runtime.launch_enter_hook.remove(told.append)
    assert len(told) == 2
    assert moved.runs == 2


def test_other_tensors_that_stay_have_their_own_addresses(log: Log) -> None:
    one, two = Moved(), Moved()
    for moved in (one, two, one, two):
        usual, again = both_ways(moved, moved.replays, tensor(), log)
        assert again == usual
    assert one.runs == 2 + 1
    assert two.runs == 2  # what the first has recorded


def test_tensors_at_one_address_are_told_apart_from_others(log: Log) -> None:
    """A program in which table and head are one tensor must not serve where they are two."""
    from dit_accel_kernels.permute.triton import permute_triton

    def function(x: Tensor) -> Result:
        return permute_triton(x, current[0], current[1], False), None

    both = torch.arange(TOKENS, dtype=torch.int32)[None].contiguous()
    x = torch.randn(1, TOKENS, TOKENS, DIM).bfloat16()
    for current in ((both, both), (both, both.clone()), (both.clone(), both)):
        replays = Replays(current, "alike")
        for _ in range(2):
            log.clear()
            function(x)
            usual = same_form(log, x, *current)
            log.clear()
            replays(function, (x,), layout(x))
            assert same_form(log, x, *current) == usual


@pytest.mark.parametrize(
    "between",
    [lambda x: x + 1, lambda x: x.mul_(2), lambda x: (x.sum().item(), None)[1], lambda x: x.clone()],
    ids=["computed", "changed", "read", "copied"],
)
def test_what_launches_cannot_make_again_is_never_replayed(log: Log, between: Callable[[Tensor], Any]) -> None:
    moved = Moved()
    moved.between = between
    replays = moved.replays
    for runs in range(1, 7):
        x = tensor()
        log.clear()
        replays(moved, (x,), layout(x))
        assert len(log) == 2
        assert moved.runs == runs


def test_a_part_of_a_tensor_that_moves_is_not_taken_for_one_that_stays(log: Log) -> None:
    from dit_accel_kernels.permute.triton import permute_triton

    moved = Moved()

    def function(x: Tensor) -> Result:
        moved.runs += 1
        return permute_triton(x[:, 1:], moved.table, moved.head[1:], False), None

    replays = moved.replays
    for runs in range(1, 6):
        replays(function, (x := tensor(),), layout(x))
        assert moved.runs == runs
        assert x[:, 1:].data_ptr() in log[-1]


def test_what_nobody_uses_is_left_out(log: Log) -> None:
    moved = Moved()
    moved.between = lambda x: (x.float().sum(), x)[1]
    replays = moved.replays
    for _ in range(3):
        usual, again = both_ways(moved, replays, tensor(), log)
        assert again == usual
    assert moved.runs == 3 + 1


def test_a_result_that_no_launch_has_written_is_not_replayed(log: Log) -> None:
    moved = Moved()

    def function(x: Tensor) -> Result:
        moved(x)
        return torch.empty(3), None

    replays = moved.replays
    for runs in range(1, 5):
        replays(function, (x := tensor(),), layout(x))
        assert moved.runs == runs


def test_a_first_call_that_tests_itself_is_recorded_later(log: Log) -> None:
    moved = Moved()
    replays = moved.replays
    moved.between = lambda x: x.clone()
    replays(moved, (x := tensor(),), layout(x))
    moved.between = lambda x: x
    replays(moved, (x := tensor(),), layout(x))
    replays(moved, (x := tensor(),), layout(x))
    assert moved.runs == 2


def test_a_tensor_of_nobody_is_pinned_and_not_shared(log: Log) -> None:
    one, two = Moved(), Moved()
    bare = [Replays([], "bare"), Replays([], "bare")]
    for moved, replays in ((one, bare[0]), (two, bare[1]), (one, bare[0]), (two, bare[1])):
        usual, again = both_ways(moved, replays, tensor(), log)
        assert again == usual
    assert one.runs == two.runs == 2 + 1


def test_errors_leave_no_recording_behind(log: Log) -> None:
    moved = Moved()
    replays = moved.replays
    moved.between = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        replays(moved, (x := tensor(),), layout(x))
    assert not is_recording()
    moved.between = lambda x: x
    usual, again = both_ways(moved, replays, tensor(), log)
    assert again == usual


def test_other_threads_are_not_recorded(log: Log) -> None:
    moved, inside, found = Moved(), threading.Event(), threading.Event()

    def other() -> None:
        inside.wait(30)
        moved(tensor())
        found.set()

    thread = threading.Thread(target=other)
    thread.start()
    with Recording([]) as recording:
        inside.set()
        assert found.wait(30)
        moved(tensor())
    thread.join()
    assert len(recording.launches) == 2


def test_two_threads_at_once(log: Log) -> None:
    moved = Moved()
    replays = moved.replays
    replays(moved, (x := tensor(),), layout(x))
    log.clear()
    errors: list[BaseException] = []

    def work(tensors: list[Tensor]) -> None:
        try:
            for _ in range(40):
                for x in tensors:
                    assert replays(moved, (x,), layout(x))[0].shape == x.shape
        except BaseException as error:
            errors.append(error)

    sets = [[tensor() for _ in range(6)] for _ in range(2)]
    threads = [threading.Thread(target=work, args=(tensors,)) for tensors in sets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    starts = [entry[6] for entry in log if entry[6] in {x.data_ptr() for tensors in sets for x in tensors}]
    assert len(starts) == 2 * 40 * 6
    assert moved.runs == 1


def test_nothing_is_recorded_while_a_graph_is_captured(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = Moved()
    replays = moved.replays
    with monkeypatch.context() as patch:
        patch.setattr("torch.cuda.is_current_stream_capturing", lambda: True)
        replays(moved, (x := tensor(),), layout(x))
        replays(moved, (x := tensor(),), layout(x))
    assert moved.runs == 2
    replays(moved, (x := tensor(),), layout(x))
    replays(moved, (x := tensor(),), layout(x))
    assert moved.runs == 3


def test_large_tensors_have_allocations_of_their_own(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    from dit_accel_kernels import programs

    monkeypatch.setattr(programs, "_LARGE", HEADS * TOKENS * DIM * 2)
    moved = Moved()
    replays = moved.replays
    for _ in range(3):
        usual, again = both_ways(moved, replays, tensor(), log)
        assert again == usual
    (program,) = replay._programs.values()
    assert program.rooms == (0, HEADS * TOKENS * DIM * 2)


def test_without_recording_a_launch_is_the_kernel_itself() -> None:
    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
            return "started", grid

    assert launch(Kernel(), (3, 1)) == ("started", (3, 1))


def test_all_that_carries_out_plans_starts_its_kernels_by_launch() -> None:
    root = Path(replay.__file__).parent
    used = ("block_sparse", "permute", "pyramid", "quantize", "quantized", "query_means", "stats")
    found = [
        f"{file.relative_to(root)}: {line.strip()}"
        for folder in used
        for file in sorted((root / folder).rglob("*.py"))
        for line in file.read_text().splitlines()
        if re.match(r"\s*(?:\w+ = )?\w*kernel\[", line)
    ]
    assert not found
