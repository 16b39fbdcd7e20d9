"""The cost model, with a clock of the test's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dit_accel.adapter import StepInfo
from dit_accel.cost import Cost, CostKey, CostModel, CostStore, cache_dir
from dit_accel.cost.measure import wall_time
from dit_accel.cost.model import PayCall, bucket
from dit_accel.geometry import TokenGeometry
from dit_accel.method import Method
from dit_accel.planner import Planner
from dit_accel.policy import Policy
from dit_accel.runtime import ModelRun

METHOD = Method(name="trial", order="axes", order_choice="recall", compensate="mean", density=0.25, warmup=0.2)


class Clock:
    """Tells the times it was given, after doing the work once."""

    def __init__(self, dense: float, sparse: dict[float, float], plan: float) -> None:
        self.times = {"dense": dense, "plan": plan, **{f"sparse {d:g}": t for d, t in sparse.items()}}
        self.asked: list[str] = []

    def __call__(self, name: str, work: Callable[[], object], device: torch.device) -> float:
        assert work() is not None
        self.asked.append(name)
        return self.times[name]


FAST = {"dense": 10.0, "sparse": {0.1: 2.0, 0.5: 6.0}, "plan": 5.0}
SLOW = {"dense": 1.0, "sparse": {0.1: 1.2, 0.5: 1.4}, "plan": 2.0}


def _call(steps: int | None = 20, heads: int = 2) -> PayCall:
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 256, 32, generator=gen) for _ in range(3))
    step = StepInfo(step=0, steps=steps)
    return PayCall(q, k, v, None, None, TokenGeometry((4, 8, 8)), step, "reference")


def _model(clock: Clock, folder: Path) -> CostModel:
    return CostModel(CostStore(folder), clock, devices=("cpu",))


def test_what_pays_is_sparse_and_what_does_not_says_why(tmp_path: Path) -> None:
    planner, policy = Planner(METHOD), Policy(METHOD)
    assert _model(Clock(**FAST), tmp_path / "a").why_not(planner, policy, _call()) is None
    reason = _model(Clock(**SLOW), tmp_path / "b").why_not(planner, policy, _call())
    assert reason is not None
    assert reason.startswith("sparse attention does not pay at 256 tokens: 1.3")
    assert "(reference)" in reason


def test_the_share_is_that_of_the_whole_run(tmp_path: Path) -> None:
    """20 steps: 4 dense ones, 16 sparse ones at 3.5 of 10 ms, one plan of 100 ms: 40 + 56 + 100 of 200 ms."""
    clock = Clock(10.0, {0.1: 2.0, 0.5: 6.0}, 100.0)
    reason = _model(clock, tmp_path).why_not(Planner(METHOD), Policy(METHOD), _call())
    assert reason is not None
    assert "0.98 of the time" in reason
    assert _model(clock, tmp_path).why_not(Planner(METHOD), Policy(METHOD), _call(steps=40)) is None


def test_a_shape_is_measured_once_and_kept_on_disk(tmp_path: Path) -> None:
    clock, planner, policy = Clock(**FAST), Planner(METHOD), Policy(METHOD)
    model = _model(clock, tmp_path)
    for _ in range(3):
        model.why_not(planner, policy, _call())
    assert clock.asked == ["dense", "sparse 0.1", "sparse 0.5", "plan"]
    again = Clock(**SLOW)
    assert _model(again, tmp_path).why_not(planner, policy, _call()) is None
    assert again.asked == []
    _model(again, tmp_path).why_not(planner, policy, _call(heads=3))
    assert len(again.asked) == 4
    record = json.loads(next(tmp_path.iterdir()).read_text())
    assert record["key"]["tokens"] == 256
    assert "torch" in record["key"]["versions"]


def test_a_broken_file_is_measured_again(tmp_path: Path) -> None:
    planner, policy = Planner(METHOD), Policy(METHOD)
    _model(Clock(**FAST), tmp_path).why_not(planner, policy, _call())
    file = next(tmp_path.iterdir())
    for content in ("", "{", '{"format": "dit_accel.cost"}', file.read_text().replace("10.0", "-1"), "[]"):
        file.write_text(content)
        clock = Clock(**FAST)
        _model(clock, tmp_path).why_not(planner, policy, _call())
        assert clock.asked, content
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_folder_that_cannot_be_written_to_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model = _model(Clock(**SLOW), tmp_path / "file" / "below")
    assert model.why_not(Planner(METHOD), Policy(METHOD), _call()) is not None


@pytest.mark.parametrize("value", ["off", "0", "false", "NO"])
def test_the_environment_switches_it_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str) -> None:
    monkeypatch.setenv("DIT_ACCEL_COST_MODEL", value)
    clock = Clock(**SLOW)
    assert _model(clock, tmp_path).why_not(Planner(METHOD), Policy(METHOD), _call()) is None
    assert clock.asked == []


def test_it_is_not_asked_on_a_processor(tmp_path: Path) -> None:
    clock = Clock(**SLOW)
    model = CostModel(CostStore(tmp_path), clock)
    assert model.why_not(Planner(METHOD), Policy(METHOD), _call()) is None
    assert clock.asked == []


def test_a_run_stays_dense_with_the_reason_in_its_status(tmp_path: Path) -> None:
    call = _call()
    tensors = [x.transpose(1, 2) for x in (call.query, call.key, call.value)]

    def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return q * 0 + 7

    for times, sparse in ((FAST, 8), (SLOW, 0)):
        cost = CostModel(CostStore(tmp_path / str(sparse)), Clock(**times), devices=("cpu",))
        run = ModelRun(METHOD, ("layer",), backend="reference", min_tokens=0, cost=cost)
        for step in range(10):
            run.begin_forward(call.geometry, StepInfo(step=step, steps=10))
            out = run.attend(*tensors, layer=0, scale=None, key_valid=None, dense=dense)
        assert run.status().sparse_calls == sparse
        assert sparse or bool((out == 7).all())
        told = [reason for reason in run.status().reasons if "does not pay" in reason]
        assert bool(told) != bool(sparse)


def test_length_buckets() -> None:
    assert [bucket(n) for n in (2048, 2304, 3000, 4096, 33_000)] == [2048, 2048, 2896, 4096, 32_768]


def test_times_between_densities_lie_on_the_line() -> None:
    cost = Cost(10.0, ((0.1, 2.0), (0.5, 6.0)), 1.0)
    assert [cost.at(d) for d in (0.1, 0.3, 0.5, 1.0)] == pytest.approx([2.0, 4.0, 6.0, 11.0])


@pytest.mark.parametrize("bad", [(0.0, 1.0), (float("nan"), 1.0), (1.0, -1.0)])
def test_times_that_cannot_be_are_refused(bad: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="times must be positive"):
        Cost(bad[0], ((0.1, 1.0), (0.5, 2.0)), bad[1])


def test_the_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DIT_ACCEL_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path / "cost"
    monkeypatch.delenv("DIT_ACCEL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_dir() == tmp_path / "x" / "dit_accel" / "cost"
    key = CostKey("cpu", "reference", "float32", 1, 2, 32, 256, "m", "v")
    CostStore().put(key, Cost(1.0, ((0.1, 1.0), (0.5, 2.0)), 1.0))
    assert CostStore().get(key) == Cost(1.0, ((0.1, 1.0), (0.5, 2.0)), 1.0)


def test_the_clock_on_the_wall_runs_the_work() -> None:
    ran: list[int] = []
    assert wall_time("work", lambda: ran.append(1), torch.device("cpu")) >= 0
    assert 3 <= len(ran) <= 6
