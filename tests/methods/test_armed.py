"""Forward calls of small transformers whose settled calls are made by C: when they are, and what ends it."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dit_accel
from dit_accel import replayed
from dit_accel.armed import Armed
from dit_accel_kernels import native
from dit_accel_patches import op
from tests.kernels.in_c import in_c
from tests.kernels.launches import REASON, watched

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from _e2e_models import TOY, build, inputs

# Poison is written by an operation of torch, which no recording lets pass.
pytestmark = [pytest.mark.skipif(REASON is not None, reason=str(REASON)), pytest.mark.no_poison]

CASE = TOY["toy-wan"]
OPTIONS: dict[str, Any] = {"min_tokens": 0, "warmup": 0.0, "density": 0.4, "block_q": 128, "block_k": 128}


@pytest.fixture(scope="module")
def module() -> Iterator[Any]:
    """The body in C, for tensors of the CPU that are served as on a Hopper GPU."""
    import host_overhead  # in benchmarks, which tests.kernels.launches has put on the path

    with contextlib.ExitStack() as stack:
        stack.enter_context(watched())
        stack.enter_context(host_overhead._as_on_hopper())
        stack.enter_context(mock.patch("dit_accel_kernels._common.triton_reason", host_overhead._nothing))
        stack.enter_context(mock.patch.object(replayed, "_EVERYWHERE", True))
        yield stack.enter_context(in_c())


class Model:
    """An accelerated Wan; ``armed`` is how many layers were armed in each forward call, ``asked`` who went to Python."""

    def __init__(self, module: Any, **options: Any) -> None:
        self.module = module
        self.wan = build(CASE, CASE.layers, torch.device("cpu"), torch.bfloat16)
        self.given = inputs(CASE, torch.device("cpu"), torch.bfloat16)
        self.handle = dit_accel.enable(self.wan, options.pop("method", "adaspa"), **OPTIONS | options)
        self.installation = self.wan.__dict__["_dit_accel"]
        self.run, self.state = self.installation.run, self.installation._state
        self.armed: list[int] = []
        self.asked: list[int] = []
        self.at = 0
        arm = self.state.arm

        def watched(numbers: Any) -> Any:
            made = arm(numbers)
            self.armed.append(len(self.run._armed._now))
            return made

        self.state.arm = watched

    def __call__(self, steps: int = 1) -> None:
        for _ in range(steps):
            asked = 0

            def body(*args: Any) -> Any:
                nonlocal asked
                asked += 1
                return op._attend(*args)

            self.module.set_body(body)
            timestep = torch.full((CASE.batch,), 900.0 - 80 * self.at)
            self.at += 1
            try:
                with torch.no_grad():
                    self.wan(timestep=timestep, return_dict=False, **self.given)
            finally:
                self.asked.append(asked)

    @property
    def calls(self) -> int:
        return len(self.run.ledger.calls)


@pytest.fixture
def model(module: Any) -> Iterator[Model]:
    made = Model(module)
    yield made
    made.handle.disable()
    module.set_body(op._attend)


def nothing_armed(model: Model) -> bool:
    """Whether a call of any layer would go to Python."""
    found = []
    model.module.set_body(lambda *args: found.append(args) or torch.zeros(1))
    x = torch.zeros(1, CASE.tokens, CASE.heads, CASE.dim, dtype=torch.bfloat16)
    with torch.no_grad():
        for number in model.state.numbers.values():
            model.module.attend(x, x.clone(), x.clone(), torch.tensor(number), None, None, False, False)
    return len(found) == len(model.state.numbers) and not model.run._armed._now


def test_what_is_settled_is_armed(model: Model) -> None:
    model(5)
    assert model.armed == [0, 0, 2, 2, 2]
    assert model.asked[2:] == [0, 0, 0]
    assert model.calls == 10
    assert model.run.ledger.cache_hits == 8
    assert nothing_armed(model)


@pytest.mark.parametrize("how", ["regional", "whole"])
def test_compiled(module: Any, how: str) -> None:
    torch._dynamo.reset()
    model = Model(module)
    if how == "regional":
        model.wan.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    else:
        model.wan.compile(fullgraph=True, backend="aot_eager")
    model(5)
    assert model.armed == [0, 0, 2, 2, 2]
    assert model.asked[2:] == [0, 0, 0]
    assert model.calls == 10
    model.handle.disable()
    torch._dynamo.reset()


@pytest.mark.parametrize(("method", "block"), [("adaspa", 128), ("auto", 64)])
def test_plans_that_are_made_anew(module: Any, method: str, block: int) -> None:
    model = Model(module, method=method, block_k=block, reuse="every:3")
    model(9)
    assert model.armed == [0, 0, 2] * 3
    assert model.asked == [2, 2, 0] * 3
    assert model.calls == 18
    model.handle.disable()


def test_guidance_branches_have_their_own(module: Any) -> None:
    model = Model(module)
    for step in range(4):
        model.at = step
        model()
        model.at = step
        model()
    assert model.armed == [0, 0, 0, 0, 2, 2, 2, 2]
    assert model.calls == 16
    model.handle.disable()


class CutError(Exception):
    pass


@pytest.mark.parametrize("error", [CutError, KeyboardInterrupt])
def test_an_exception_in_the_middle(model: Model, error: type[BaseException]) -> None:
    model(3)

    def cut(*_: Any) -> None:
        raise error

    hook = model.wan.blocks[1].register_forward_pre_hook(cut)
    with pytest.raises(error):
        model()
    hook.remove()
    if error is CutError:
        assert nothing_armed(model)
        assert model.calls == 7, "the first layer's is counted"
    model.at = 0
    model(3)
    assert model.armed[-3:] == [0, 0, 2], "the run began anew"
    assert model.calls == 6


def test_disabled_in_the_middle(model: Model) -> None:
    model(3)
    hook = model.wan.blocks[1].register_forward_pre_hook(lambda *_: model.handle.disable())
    model()
    hook.remove()
    assert nothing_armed(model)
    assert model.asked[-1] == 0, "the second layer has its own processor again"


def test_a_layer_that_changes_is_asked(model: Model) -> None:
    model(3)
    block = model.wan.blocks[1].attn1
    hook = block.to_v.register_forward_hook(lambda module, args, out: out.float().to(torch.float16).to(out.dtype) * 1)
    model()
    hook.remove()
    assert model.asked[-1] == 0, "the same layout"
    model.run.begin_forward(model.run._geometry, dit_accel.StepInfo(step=9, steps=10))
    assert nothing_armed(model)


def test_other_sizes(model: Model) -> None:
    model(3)
    kept = dict(model.given)
    model.given["hidden_states"] = model.given["hidden_states"][..., :-4, :]
    model()
    assert model.armed[-1] == 0
    model.given = kept
    model(3)
    assert model.armed[-1] == 2


def test_two_models(module: Any) -> None:
    one, other = Model(module), Model(module)
    for _ in range(4):
        one()
        other()
    assert one.armed == other.armed == [0, 0, 2, 2]
    assert one.calls == other.calls == 8
    assert not set(one.state.numbers.values()) & set(other.state.numbers.values())
    hook = one.wan.blocks[0].register_forward_hook(lambda *_: other())
    one()
    hook.remove()
    assert one.asked[-1] == other.asked[-1] == 0
    assert one.calls == other.calls == 10
    one.handle.disable()
    other.handle.disable()


def test_what_keeps_it_from_being_armed(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    model(2)

    def armed() -> int:
        model()
        return model.armed[-1]

    for name in ("recorder", "observer"):
        monkeypatch.setattr(model.run, name, object())
        assert model.run.arm(model.state.numbers) is None
        monkeypatch.undo()
    hook = knobs.runtime.launch_enter_hook

    def waits(*_: Any) -> None: ...

    hook.add(waits)
    try:
        assert armed() == 0
    finally:
        hook.remove(waits)
    model()
    assert armed() == 2
    monkeypatch.setenv(replayed.VARIABLE, "off")
    assert armed() == 0
    monkeypatch.undo()
    assert armed() == 2
    monkeypatch.setattr(model.state, "spread", object())
    count = len(model.armed)
    op.arm(model.state)
    assert len(model.armed) == count
    monkeypatch.undo()
    monkeypatch.setattr(model.state, "rule", mock.Mock(hands_over=False))
    op.arm(model.state)
    assert len(model.armed) == count


def test_it_is_not_tried_out_under_a_mode(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a mode sees is not what its self-test would look for."""

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    model(3)
    known = list(native._known)
    monkeypatch.setattr(native, "_known", [])
    with Watching():
        assert model.run.arm(model.state.numbers) is None
    assert not native.is_made()
    with mock.patch.object(native, "_found", return_value=known[0]):
        assert model.run.arm(model.state.numbers) is known[0].module
    assert native.is_made()


def test_what_was_dropped_lives_while_it_is_armed(model: Model) -> None:
    """Index lists that another layer's call drops in the middle are not given back before the forward call ends."""
    model(3)
    lists = [weakref.ref(state.plan.mask.lists()) for state in model.run._states.values()]

    def drop(*_: Any) -> None:
        model.run._lists.clear()
        for state in model.run._states.values():
            state.plan.mask.drop_lists()
        gc.collect()
        assert all(ref() is not None for ref in lists)

    hook = model.wan.blocks[0].register_forward_pre_hook(drop)
    model()
    hook.remove()
    assert model.asked[-1] == 0
    gc.collect()
    assert all(ref() is None for ref in lists), "and then they go"


def test_copies_and_the_end(model: Model) -> None:
    model(3)
    assert isinstance(copy.deepcopy(model.run._armed), Armed)
    assert isinstance(pickle.loads(pickle.dumps(model.run._armed)), Armed)
    model.run.arm(model.state.numbers)
    model.run.__dict__["_armed"] = Armed()
    gc.collect()
    assert nothing_armed(model), "who armed them is gone"
