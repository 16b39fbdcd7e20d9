"""Sparse calls as launches alone: the launches that the usual way makes, and on a GPU the same bits."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dit_accel.plan
from dit_accel import replayed
from dit_accel.geometry import TokenGeometry
from dit_accel.plan import Plan, execute_with_lse
from dit_accel_kernels import _common
from tests.kernels.launches import REASON, Log, agree, same_form, watched
from tests.methods.problems import make_plan

needs_idle = pytest.mark.skipif(REASON is not None, reason=str(REASON))
# Poison is written by an operation of torch, which no recording lets pass.
pytestmark = pytest.mark.no_poison

GRID = TokenGeometry((3, 16, 17))  # 816 tokens: ragged blocks
HEADS, DIM = 2, 64
Tensors = tuple[Tensor, Tensor, Tensor]
_reason = _common.triton_reason


def tensors(seed: int = 0, dtype: torch.dtype = torch.bfloat16, layout: str = "bshd", batch: int = 1) -> Tensors:
    """Queries, keys and values ``[B, H, S, D]``."""
    gen = torch.Generator().manual_seed(seed)
    shape = (batch, GRID.tokens, 3, HEADS, DIM)
    together = torch.randn(shape, generator=gen).to(dtype)
    parts = together.unbind(2)
    if layout == "fused":
        q, k, v = (x.transpose(1, 2) for x in parts)
    elif layout == "bhsd":
        q, k, v = (x.transpose(1, 2).contiguous() for x in parts)
    else:
        q, k, v = (x.contiguous().transpose(1, 2) for x in parts)
    return q, k, v


def plan_of(name: str, seed: int = 0, **changes: Any) -> Plan:
    """A plan of a preset, made on the CPU in float32."""
    q, k, v = (x.float() for x in tensors(seed))
    blocks = {"block_q": 128, "block_k": 64 if name == "auto" else 128}
    with mock.patch("dit_accel_kernels._common.triton_reason", _reason):
        return make_plan(name, GRID, (q, k, v), **blocks | changes)


def sparse(plan: Plan, qkv: Tensors, backend: str = "hopper", want_lse: bool = False) -> tuple[Tensor, Tensor | None]:
    return execute_with_lse(plan, *qkv, scale=None, key_valid=None, backend=backend, want_lse=want_lse)


def usual(plan: Plan, qkv: Tensors, backend: str = "hopper", want_lse: bool = False) -> tuple[Tensor, Tensor | None]:
    whole: Any = dit_accel.plan._execute_whole
    return whole(*qkv, plan, None, DIM**-0.5, backend, want_lse)


class Kept(TorchDispatchMode):
    """Keeps what is allocated, so that no address stands for two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.tensors.append(out)
        return out


class Counted:
    """How often the usual way was gone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs, real = 0, dit_accel.plan._execute_whole

        def counting(*args: Any) -> Any:
            self.runs += 1
            return real(*args)

        monkeypatch.setattr(dit_accel.plan, "_execute_whole", counting)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[Log]:
    """Launches to a driver that does nothing, of tensors on the CPU served as on a Hopper GPU."""
    import host_overhead  # in benchmarks, which tests.kernels.launches has put on the path

    with watched() as found, host_overhead._as_on_hopper():
        monkeypatch.setattr("dit_accel_kernels._common.triton_reason", lambda x: None)
        monkeypatch.setattr(replayed, "_EVERYWHERE", True)
        yield found


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


def stays(plan: Plan) -> list[Tensor | None]:
    """Tensors whose addresses are the plan's."""
    lists, mask = plan.mask.lists(), plan.mask
    found = [lists.row_start, lists.full, lists.partial, lists.indices, mask.bits, plan.seen_bits, plan.bias]
    found += plan.compensation.stays(plan)
    return found + [x for order in (plan.order, plan.key_order) if order is not None for x in (order.table, order.head)]


def compare(plan: Plan, qkv: Tensors, log: Log, backend: str = "hopper", want_lse: bool = False) -> int:
    """Assert that the call launches what the usual way launches, and return how much that is."""
    usual(plan, qkv, backend, want_lse)  # what is made once for a plan
    log.clear()
    with Kept():
        usual(plan, qkv, backend, want_lse)
    wanted = same_form(log, *qkv, *stays(plan))
    log.clear()
    out, lse = sparse(plan, qkv, backend, want_lse)
    assert agree(same_form(log, *qkv, *stays(plan)), wanted)
    assert (out.shape, out.stride(), out.dtype) == (qkv[0].shape, torch.empty_like(qkv[0]).stride(), qkv[0].dtype)
    assert (lse is not None) == (want_lse or plan.compensation.needs_lse)
    return len(wanted)


@needs_idle
@pytest.mark.parametrize(("name", "launches"), [("auto", 7), ("adaspa", 1), ("union", 2), ("radial", 1)])
def test_launches_are_those_of_the_usual_way(log: Log, counted: Counted, name: str, launches: int) -> None:
    plan = plan_of(name)
    for seed in range(3):
        assert compare(plan, tensors(seed), log) == launches
    assert counted.runs == 3 * 2 + 1


@needs_idle
def test_layouts_dtypes_and_results_are_told_apart(log: Log, counted: Counted) -> None:
    plan = plan_of("adaspa")
    kinds: list[dict[str, Any]] = [{}, {"layout": "bhsd"}, {"layout": "fused"}, {"dtype": torch.float16}, {"batch": 2}]
    for _ in range(2):
        for kind in kinds:
            compare(plan, tensors(**kind), log)
        compare(plan, tensors(), log, want_lse=True)
    assert counted.runs == 2 * 2 * 6 + 6


@needs_idle
def test_the_portable_kernel_too(log: Log, counted: Counted) -> None:
    plan = plan_of("adaspa", block_q=64, block_k=64)
    for seed in range(2):
        assert compare(plan, tensors(seed), log, backend="triton") == 1
    assert counted.runs == 2 * 2 + 1


@needs_idle
def test_a_new_plan_uses_what_another_has_recorded(log: Log, counted: Counted) -> None:
    for seed in range(3):
        compare(plan_of("union", seed), tensors(), log)
    assert counted.runs == 3 * 2 + 1


@needs_idle
def test_the_first_call_of_a_further_plan_is_launches_alone(log: Log, counted: Counted) -> None:
    plans = [plan_of("union", seed) for seed in range(3)]
    for plan in plans:
        sparse(plan, tensors())
    assert counted.runs == 1
    for plan in plans:
        found = plan.bias
        plan.bias = None
        usual(plan, tensors())
        assert found is not None
        assert torch.equal(found.isfinite(), torch.ones_like(found, dtype=torch.bool))
        assert found.shape == plan.bias.shape
        assert found.stride() == plan.bias.stride()


@needs_idle
def test_lists_that_were_dropped_are_looked_up_again_and_not_kept(log: Log, counted: Counted) -> None:
    plan, qkv = plan_of("adaspa"), tensors()
    compare(plan, qkv, log)
    old = weakref.ref(plan.mask.lists())
    plan.mask.drop_lists()
    gc.collect()
    assert old() is None
    held = torch.empty(1 << 16)  # what comes into the place of the old lists
    with mock.patch("dit_accel_kernels._common.triton_reason", _reason):
        plan.mask.lists()
    compare(plan, qkv, log)
    assert counted.runs == 2 * 2 + 1
    del held


@needs_idle
def test_a_changed_plan_is_launched_as_changed(log: Log) -> None:
    plan, other, qkv = plan_of("union"), plan_of("union", 5), tensors()
    compare(plan, qkv, log)
    plan.order, plan.key_order = other.order, other.key_order
    compare(plan, qkv, log)
    plan.seen_bits = plan.mask.bits.clone()
    compare(plan, qkv, log)
    plan.bias = None
    compare(plan, qkv, log)


@needs_idle
def test_other_backends_go_the_usual_way(log: Log, counted: Counted) -> None:
    plan, qkv = plan_of("adaspa"), tensors()
    for backend in ("reference", "cpu", "flex", None):
        assert replayed.replays_of(plan, qkv[0], backend) is None
    assert plan.replays is None


@needs_idle
@pytest.mark.parametrize("value", ["off", "0", " False ", "no"])
def test_the_switch(log: Log, counted: Counted, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    plan, qkv = plan_of("adaspa"), tensors()
    monkeypatch.setenv(replayed.VARIABLE, value)
    for runs in range(1, 4):
        sparse(plan, qkv)
        assert counted.runs == runs
    assert plan.replays is None
    monkeypatch.setenv(replayed.VARIABLE, "on")
    for _ in range(3):
        sparse(plan, qkv)
    assert counted.runs == 4


@needs_idle
def test_compensations_that_torch_computes_go_the_usual_way(log: Log, counted: Counted) -> None:
    plan, qkv = plan_of("pisa"), tensors()
    for runs in range(1, 7):
        sparse(plan, qkv)
        assert counted.runs == runs


@needs_idle
def test_modes_and_subclasses_go_the_usual_way(log: Log, counted: Counted) -> None:
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    plan, qkv = plan_of("adaspa"), tensors()
    sparse(plan, qkv)
    sparse(plan, qkv)
    assert counted.runs == 1
    assert plan.replays is not None
    options = None, "hopper", False
    assert plan.replays.again(plan, qkv, options) is not None
    with Watch():
        assert plan.replays.again(plan, qkv, options) is None
        assert replayed.replays_of(plan, qkv[0], "hopper") is None
    kind: Any = type("Kind", (Tensor,), {})
    other = qkv[0].as_subclass(kind)
    assert plan.replays.again(plan, (other, *qkv[1:]), options) is None
    assert replayed.replays_of(plan, other, "hopper") is None


@needs_idle
def test_copies_of_a_plan_start_anew(log: Log) -> None:
    plan, qkv = plan_of("adaspa"), tensors()
    for _ in range(3):
        sparse(plan, qkv)
    assert plan.replays is not None
    for copied in (copy.copy(plan.replays), copy.deepcopy(plan).replays, pickle.loads(pickle.dumps(plan.replays))):
        assert copied is None
    compare(copy.deepcopy(plan), qkv, log)


@needs_idle
def test_only_a_call_like_the_one_before_takes_the_short_way(log: Log, counted: Counted) -> None:
    plan, one, two = plan_of("adaspa"), tensors(), tensors(layout="fused")
    for qkv in (one, two) * 3:
        compare(plan, qkv, log)
    assert plan.replays is not None
    assert plan.replays.again(plan, one, (None, "hopper", False)) is None
    assert plan.replays.again(plan, two, (None, "hopper", True)) is None
    assert plan.replays.again(plan, two, (0.5, "hopper", False)) is None
    log.clear()
    assert plan.replays.again(plan, two, (None, "hopper", False)) is not None
    assert len(log) == 1
    plan.order = plan.key_order = None
    plan.bias = torch.zeros(1)
    assert plan.replays.again(plan, two, (None, "hopper", False)) is None


@needs_idle
def test_enabled_again_the_launches_are_the_same(log: Log) -> None:
    import host_overhead

    forms = []
    for _ in range(2):
        with host_overhead.sparse("adaspa", torch.device("cpu")) as found:
            plan = next(iter(found.installation.run._states.values())).plan
            assert plan.replays.replays._bound
            for call in found.calls[:2]:
                log.clear()
                call()
                forms.append(same_form(log))
    assert len(forms[0]) == 1
    assert forms == [forms[0]] * 4


def on_gpu(plan: Plan, device: str = "cuda") -> Plan:
    """The plan with its tensors on the GPU; what it has derived is derived again."""
    from dataclasses import replace

    from dit_accel.mask import BlockMask
    from dit_accel_kernels.types import TokenOrder

    def moved(x: Any) -> Any:
        if isinstance(x, TokenOrder):
            return TokenOrder(x.table.to(device), x.head.to(device))
        return x.to(device) if isinstance(x, Tensor) else x

    mask: BlockMask = plan.mask.to(device)
    fields = ("order", "key_order", "density", "seen_bits", "bias")
    return replace(plan, mask=mask, **{name: moved(getattr(plan, name)) for name in fields})


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["auto", "adaspa", "union", "radial"])
@pytest.mark.parametrize("backend", ["hopper", "triton"])
def test_bits_on_a_gpu(counted: Counted, name: str, backend: str) -> None:
    plan, again = on_gpu(plan_of(name)), on_gpu(plan_of(name, 1))
    kinds: list[dict[str, Any]] = [{}, {"layout": "bhsd"}, {"layout": "fused"}, {"dtype": torch.float16}, {"batch": 2}]
    for made in (plan, again):
        for kind in kinds:
            for seed in range(4):
                qkv = tuple(x.cuda() if kind.get("layout") != "fused" else x for x in tensors(seed, **kind))
                if kind.get("layout") == "fused":
                    base = torch.randn(1, GRID.tokens, 3, HEADS, DIM, device="cuda").bfloat16()
                    qkv = tuple(x.transpose(1, 2) for x in base.unbind(2))
                want = usual(made, qkv, backend)[0]
                runs = counted.runs
                got = sparse(made, qkv, backend)[0]
                assert torch.equal(got, want), (kind, seed)
                assert seed < 3 or counted.runs == runs


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one(counted: Counted) -> None:
    plan, qkv = on_gpu(plan_of("auto"), "cuda:1"), tuple(x.to("cuda:1") for x in tensors())
    want = usual(plan, qkv)[0]
    for _ in range(3):
        assert torch.equal(sparse(plan, qkv)[0], want)
    assert counted.runs <= 3
    assert torch.cuda.current_device() == 0


@pytest.mark.gpu
def test_graphs_streams_and_threads_on_a_gpu() -> None:
    plan, sets = on_gpu(plan_of("auto")), [tuple(x.cuda() for x in tensors(seed)) for seed in range(6)]
    wanted = [usual(plan, qkv)[0] for qkv in sets]
    for _ in range(3):
        sparse(plan, sets[0])
    static = tuple(x.clone() for x in sets[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sparse(plan, static)[0]
    for qkv, want in zip(sets, wanted):
        for mine, given in zip(static, qkv):
            mine.copy_(given)
        graph.replay()
        assert torch.equal(out, want)
    failures: list[str] = []

    def work(places: range) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            for _ in range(30):
                for i in places:
                    got = sparse(plan, sets[i])[0]
                    if not torch.equal(got, wanted[i]):
                        failures.append(f"set {i}")

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(places,)) for places in (range(3), range(3, 6))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
