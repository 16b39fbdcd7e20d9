"""Whole runs of small transformers with settled calls made by C: the same bits, compiled or not, and none of our Python."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dit_accel
from dit_accel import replayed, settled
from dit_accel_patches import op

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from _e2e_models import TOY, build, inputs

# Poison is written by an operation of torch, which no recording lets pass.
pytestmark = [pytest.mark.gpu, pytest.mark.no_poison]

STEPS = 9


@pytest.fixture(autouse=True)
def _kernels_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """inductor takes the fastest form of a kernel, and remembers it for all: another process may have timed another one."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))


class Counts:
    """Settled calls by who made them."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.native = self.python = 0
        count, call = settled.Settled.count, settled.Settled.__call__

        def counts(this: Any, run: Any, layer: int, step: int | None, calls: int) -> None:
            self.native += calls
            count(this, run, layer, step, calls)

        def calls(*args: Any) -> Any:
            made = call(*args)
            self.python += made is not None
            self.native -= made is not None
            return made

        patch.setattr(settled.Settled, "count", counts)
        patch.setattr(settled.Settled, "__call__", calls)


def native_module() -> Any:
    from dit_accel_kernels import native

    assert native.why_not() is None
    return native.native()


def compiled(model: nn.Module, how: str) -> nn.Module:
    """A model compiled as a whole, by its blocks, or not at all."""
    torch._dynamo.reset()
    if how == "whole":
        return torch.compile(model, dynamic=False)  # type: ignore[return-value]
    if how == "regional":
        for blocks in (child for child in model.children() if isinstance(child, nn.ModuleList)):
            for block in blocks:
                block.compile(fullgraph=True)
    return model


def run(
    case: str,
    name: str,
    patch: pytest.MonkeyPatch,
    *,
    how: str = "eager",
    replays: bool = True,
    branches: int = 1,
    at: Callable[[int, Any, Any], None] | None = None,
    **options: Any,
) -> tuple[list[Tensor], Counts, Any]:
    """Outputs of forward calls at falling timesteps, what made their settled calls, and the status.

    ``at(step, model, handle)`` is called before each step.
    """
    device = torch.device("cuda")
    given = inputs(TOY[case], device, torch.bfloat16)
    outputs = []
    with patch.context() as here, torch.no_grad():
        counts = Counts(here)
        if not replays:
            here.setenv(replayed.VARIABLE, "off")
        model = build(TOY[case], TOY[case].layers, device, torch.bfloat16)
        options = {"density": 0.4, "min_tokens": 0, "warmup": 0.0} | options
        with dit_accel.enabled(model, name, **options) as handle:
            called = compiled(model, how)
            torch.manual_seed(0)
            for step in range(STEPS):
                if at is not None:
                    at(step, model, handle)
                timestep = torch.full((TOY[case].batch,), 900.0 - 80 * step, device=device)
                for _ in range(branches):
                    outputs.append(called(timestep=timestep, return_dict=False, **given)[0].clone())
            status = next(iter(handle.stats().values()))
    return outputs, counts, status


def same(mine: list[Tensor], theirs: list[Tensor]) -> None:
    for step, (one, other) in enumerate(zip(mine, theirs, strict=True)):
        assert torch.equal(one, other), step


def test_it_is_there() -> None:
    native_module()


@pytest.mark.parametrize("how", ["eager", "regional", "whole"])
@pytest.mark.parametrize("name", ["auto", "adaspa"])
def test_bits(name: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    usual, off, told = run("toy-wan", name, monkeypatch, how=how, replays=False)
    assert off.native == off.python == 0
    mine, counts, status = run("toy-wan", name, monkeypatch, how=how)
    same(mine, usual)
    print(f"{name} {how}: {counts.native} by C, {counts.python} by Python, of {status.sparse_calls}")
    assert counts.native > 0
    assert counts.python == 0
    for field in ("calls", "sparse_calls", "cache_hits", "plans", "backend"):
        assert getattr(status, field) == getattr(told, field), field
    assert status.density == pytest.approx(told.density)


@pytest.mark.parametrize("name", ["auto", "adaspa"])
def test_bits_with_guidance(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    usual, _, told = run("toy-wan", name, monkeypatch, how="regional", replays=False, branches=2)
    mine, counts, status = run("toy-wan", name, monkeypatch, how="regional", branches=2)
    same(mine, usual)
    assert counts.native > 0
    assert status.sparse_calls == told.sparse_calls


@pytest.mark.parametrize("name", ["auto", "adaspa", "union"])
def test_bits_with_plans_made_anew(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"how": "regional", "reuse": "every:4"}
    usual, _, told = run("toy-wan", name, monkeypatch, replays=False, **options)
    mine, counts, status = run("toy-wan", name, monkeypatch, **options)
    same(mine, usual)
    print(f"{name}: {counts.native} by C, {status.plans} plans")
    assert counts.native > 0
    assert (status.plans, status.sparse_calls) == (told.plans, told.sparse_calls)


@pytest.mark.parametrize("case", ["toy-hunyuan", "toy-cog", "toy-flux"])
def test_bits_of_other_models(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    usual, _, _ = run(case, "auto", monkeypatch, how="regional", replays=False)
    mine, counts, _ = run(case, "auto", monkeypatch, how="regional")
    print(f"{case}: {counts.native} by C, {counts.python} by Python")
    same(mine, usual)
    assert (counts.native > 0) == (case != "toy-cog"), (
        "its heads stand before its tokens: what is launched is copied then"
    )


def moved(step: int, model: Any, handle: Any) -> None:
    """Weights go to the host and come back, as offloading has them do."""
    if step in (4, 6):
        model.to("cpu")
        model.to("cuda")


def changed(step: int, model: Any, handle: Any) -> None:
    """Weights change in place, as a fused LoRA has them do."""
    if step == 5:
        model.blocks[0].attn1.to_q.weight.mul_(1.05)


def disabled(step: int, model: Any, handle: Any) -> None:
    """Acceleration ends in the middle of a run."""
    if step == 6:
        handle.disable()


def noted(step: int, model: Any, handle: Any) -> None:
    """Somebody asks for the status in the middle of a run, which counts what was done so far."""
    if step > 2:
        assert next(iter(handle.stats().values())).calls == step * len(model.blocks)


@pytest.mark.parametrize("at", [moved, changed, disabled, noted], ids=lambda at: at.__name__)
def test_bits_while_things_change(at: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    usual, _, _ = run("toy-wan", "adaspa", monkeypatch, how="regional", replays=False, at=at)
    mine, counts, _ = run("toy-wan", "adaspa", monkeypatch, how="regional", at=at)
    same(mine, usual)
    assert counts.native > 0


def test_bits_with_other_sizes_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another batch in the middle: the plans of the first stay, its calls go on."""
    device, outs = torch.device("cuda"), []
    for replays in (False, True):
        with monkeypatch.context() as here, torch.no_grad():
            counts = Counts(here)
            if not replays:
                here.setenv(replayed.VARIABLE, "off")
            model = build(TOY["toy-wan"], TOY["toy-wan"].layers, device, torch.bfloat16)
            one = inputs(TOY["toy-wan"], device, torch.bfloat16)
            two = {name: torch.cat((x, x.flip(-1))) for name, x in one.items()}
            found = []
            with dit_accel.enabled(model, "adaspa", density=0.4, min_tokens=0, warmup=0.0):
                for step in range(STEPS):
                    given = two if step in (4, 5) else one
                    timestep = torch.full((len(given["hidden_states"]),), 900.0 - 80 * step, device=device)
                    found.append(model(timestep=timestep, return_dict=False, **given)[0])
            outs.append(found)
    same(outs[1], outs[0])
    assert counts.native > 0


def test_bits_on_another_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    usual, _, _ = run("toy-wan", "adaspa", monkeypatch, replays=False)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        mine, counts, _ = run("toy-wan", "adaspa", monkeypatch)
    torch.cuda.synchronize()
    same(mine, usual)
    assert counts.native > 0


def test_two_models_in_two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its own calls, whoever runs when."""
    usual, _, _ = run("toy-wan", "adaspa", monkeypatch, replays=False)
    device, case = torch.device("cuda"), TOY["toy-wan"]
    models = [build(case, case.layers, device, torch.bfloat16) for _ in range(2)]
    given = inputs(case, device, torch.bfloat16)
    handles = [dit_accel.enable(model, "adaspa", density=0.4, min_tokens=0, warmup=0.0) for model in models]
    found: list[list[Tensor]] = [[], []]

    def work(which: int) -> None:
        with torch.no_grad():
            for step in range(STEPS):
                timestep = torch.full((case.batch,), 900.0 - 80 * step, device=device)
                found[which].append(models[which](timestep=timestep, return_dict=False, **given)[0].clone())

    with monkeypatch.context() as here:
        counts = Counts(here)
        threads = [threading.Thread(target=work, args=(which,)) for which in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for outputs in found:
        same(outputs, usual)
    assert counts.native > 0
    for handle in handles:
        handle.disable()


def test_a_graph_captured_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step in C inside of a CUDA graph: replays write what the step wrote."""
    device = torch.device("cuda")
    model = build(TOY["toy-wan"], TOY["toy-wan"].layers, device, torch.bfloat16)
    given = inputs(TOY["toy-wan"], device, torch.bfloat16)
    with torch.no_grad(), dit_accel.enabled(model, "adaspa", density=0.4, min_tokens=0, warmup=0.0):
        for step in range(4):
            timestep = torch.full((1,), 900.0 - 80 * step, device=device)
            want = model(timestep=timestep, return_dict=False, **given)[0]
        installation = model.__dict__["_dit_accel"]
        settled_before = set(installation.run._settled)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            out = model(timestep=timestep, return_dict=False, **given)[0]
        assert settled_before
        for _ in range(3):
            out.zero_()
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(out, want)


def test_no_python_of_ours_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is armed does without the body in Python: one that raises is never called."""
    module, armed = native_module(), list[bool]()

    def never(*_: Any) -> Any:
        raise AssertionError("the operator's body in Python was called")

    def at(step: int, model: Any, handle: Any) -> None:
        state = model.__dict__["_dit_accel"]._state

        def watching(numbers: Any) -> Any:
            made = state.run.arm(numbers)
            armed.append(len(state.run._armed._now) == len(numbers))
            module.set_body(never if armed[-1] else op._attend)
            return made

        state.arm = watching

    try:
        _, counts, _ = run("toy-wan", "adaspa", monkeypatch, how="regional", at=at)
    finally:
        module.set_body(op._attend)
    assert sum(armed) >= 3
    assert counts.native == 2 * sum(armed)
