"""Calls that nothing is left to decide about, and everything that makes them be asked again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dit_accel
from dit_accel.settled import Settled
from dit_accel_patches.handles import current
from tests.kernels.launches import REASON, Log, same_form, watched

pytestmark = [pytest.mark.skipif(REASON is not None, reason=str(REASON)), pytest.mark.no_poison]


@pytest.fixture(scope="module", params=["adaspa", "auto"])
def made(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A sparse call whose plan is made, served as on a Hopper GPU by a driver that does nothing."""
    import host_overhead  # in benchmarks, which tests.kernels.launches has put on the path

    with watched() as log, host_overhead.sparse(request.param, torch.device("cpu")) as found:
        run = found.installation.run
        yield SimpleNamespace(run=run, log=log, found=found, qkv=found.qkv, installation=found.installation)


@pytest.fixture
def call(made: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Tensor | None]]:
    """Asks what a step can do without deciding: the call's output, or ``None``."""
    run = made.run
    geometry = run._geometry
    run.begin_forward(geometry, dit_accel.StepInfo(step=3, steps=10))
    made.found.calls[0]()
    made.found.calls[0]()

    def at(step: int = 3, qkv: Any = None, scale: float | None = None) -> Tensor | None:
        run.begin_forward(geometry, dit_accel.StepInfo(step=step, steps=10))
        found: Tensor | None = run.again(0, *(qkv or made.qkv), scale)
        return found

    with torch.no_grad():
        yield at


def test_launches_and_counts_are_those_of_the_usual_way(made: Any, call: Any) -> None:
    run, log = made.run, made.log
    plan = next(iter(run._states.values())).plan
    known = [*made.qkv, plan.mask.bits, *plan.compensation.stays(plan)]

    def launched(what: Callable[[], Any]) -> tuple[Log, Any]:
        log.clear()
        before, hits = len(run.ledger.calls), run.ledger.cache_hits
        out = what()
        return same_form(log, *known), (
            run.ledger.calls[before:],
            run.ledger.cache_hits - hits,
            out.shape,
            out.stride(),
        )

    assert call() is not None
    run._settled.clear()
    usual, counted = launched(made.found.calls[0])
    mine, found = launched(lambda: run.again(0, *made.qkv, None))
    assert mine == usual
    assert found == counted


def test_the_operator_asks_first(made: Any, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    call()

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("the run was asked")

    monkeypatch.setattr(made.run, "_attend", never)
    assert made.found.calls[0]().shape == made.qkv[0].shape
    mask = torch.ones(1, 1, 1, made.qkv[0].shape[1], dtype=torch.bool)
    layer = current().layer
    with pytest.raises(AssertionError, match="the run was asked"):
        torch.ops.dit_accel.attend(*made.qkv, layer, mask, None, False, False)
    assert torch.ops.dit_accel.attend(*made.qkv, layer, None, None, False, False).shape == made.qkv[0].shape


def test_steps_that_the_schedule_sees_otherwise(made: Any, call: Any) -> None:
    at = next(iter(made.run._states.values())).planned_at
    assert call() is not None
    if at is not None:
        assert call(at) is None, "the step that planned: the run was interrupted"
        made.run.begin_forward(made.run._geometry, dit_accel.StepInfo(step=3, steps=10))
        _settle(made, call)
    run = made.run
    run.begin_forward(run._geometry, dit_accel.StepInfo(step=3, steps=10, branch="uncond"))
    assert run.again(0, *made.qkv, None) is None, "another branch"
    assert call() is not None
    assert run.again(1, *made.qkv, None) is None, "another layer"
    run._step = dit_accel.StepInfo(step=3, steps=12)
    assert run.again(0, *made.qkv, None) is None, "another number of steps"


def _dense(run: Any) -> None:
    for key in list(run._actions):
        del run._actions[key]
    run._action(True, next(iter(run._states.values())).planned_at)
    run._actions = dict.fromkeys(run._actions, type(next(iter(run._actions.values()))).DENSE)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "blends": lambda run: run.blends.append(object()),
    "recorder": lambda run: setattr(run, "recorder", object()),
    "observer": lambda run: setattr(run, "observer", object()),
    "share": lambda run: setattr(run, "share", object()),
    "plan": lambda run: setattr(next(iter(run._states.values())), "plan", None),
    "old": lambda run: next(iter(run._states.values())).old.append(object()),
    "planned again": lambda run: setattr(next(iter(run._states.values())), "planned_at", -1),
    "bias": lambda run: setattr(next(iter(run._states.values())).plan, "bias", torch.zeros(1)),
    "schedule": _dense,
    "reset": lambda run: run._forget(),
}


@pytest.mark.parametrize("what", CHANGES)
def test_whatever_changes_is_seen(made: Any, call: Any, what: str) -> None:
    run = made.run
    assert call() is not None
    state = next(iter(run._states.values()))
    kept = {name: getattr(run, name) for name in ("recorder", "observer", "share", "_states")}
    kept_state, kept_bias = dict(state.__dict__), state.plan.bias
    kept["_states"] = dict(run._states)
    try:
        CHANGES[what](run)
        assert run.again(0, *made.qkv, None) is None
    finally:
        run.blends.clear()
        state.old.clear()
        state.__dict__.update(kept_state)
        state.plan.bias = kept_bias
        for name, value in kept.items():
            setattr(run, name, value)


def test_other_tensors_are_seen(made: Any, call: Any) -> None:
    q, k, v = made.qkv
    fused = torch.stack((q, k, v), 2).unbind(2)
    others: dict[str, Any] = {
        "layout": fused,
        "one layout": (q, k, fused[2]),
        "dtype": tuple(x.half() for x in (q, k, v)),
        "one dtype": (q, k, v.half()),
        "length": tuple(x[:, :-1].contiguous() for x in (q, k, v)),
        "batch": tuple(x.repeat(2, 1, 1, 1) for x in (q, k, v)),
        "subclass": (torch.nn.Parameter(q, requires_grad=False), k, v),
    }
    for name, qkv in others.items():
        _settle(made, call)
        assert call(qkv=qkv) is None, name
    _settle(made, call)
    assert call(scale=0.5) is None
    assert not made.run._settled, "what does not fit any more is not kept"


def _settle(made: Any, call: Any) -> None:
    """Make a call the usual way, so that the next one need not."""
    made.found.calls[0]()
    assert call() is not None


def test_who_watches_sees_the_usual_way(made: Any, call: Any) -> None:
    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    assert call() is not None
    with Watching():
        assert made.run.again(0, *made.qkv, None) is None
    _settle(made, call)
    with torch.enable_grad():
        assert made.run.again(0, *made.qkv, None) is None


def test_only_what_stays_settles(made: Any, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made.run
    run._settled.clear()
    monkeypatch.setattr(run._lists, "keeps", lambda mask: False)
    made.found.calls[0]()
    assert not run._settled, "its lists may be dropped"
    monkeypatch.undo()
    made.found.calls[0]()
    assert [type(found) for found in run._settled.values()] == [Settled]


def test_a_new_ledger_is_told_the_number_formats(made: Any, call: Any) -> None:
    run = made.run
    run._settled.clear()
    run.ledger.note_precision(0, "int8_fp8")
    made.found.calls[0]()
    kept, run.ledger = run.ledger, type(run.ledger)()
    try:
        assert call() is not None
        assert run.ledger.precisions[0][0] == "int8_fp8"
        assert run.ledger.backend == "hopper"
    finally:
        kept.precisions.clear()
        run.ledger = kept
        run._settled.clear()
