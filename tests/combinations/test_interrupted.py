"""Runs that are cut short, and threads: the next run is as if nothing had been before."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from dit_accel_patches.callers import whereabouts

FAMILIES = ("wan", "flux", "cogvideox")


class Stop(Exception):
    pass


def cut_in_callback(tiny: Any, step: int, error: type[BaseException]) -> None:
    """A run that ends behind a step: the user's callback raises."""

    def callback(pipe: Any, at: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if at == step:
            raise error
        return {}

    # Another prompt: a plan of this run that stayed would show in the next.
    with pytest.raises(error):
        tiny(prompt_embeds=tiny.call["prompt_embeds"] * 3, callback_on_step_end=callback)


def cut_in_forward(tiny: Any, call: int, error: type[BaseException]) -> None:
    """A run that ends within a call of the transformer, between two attention layers."""
    blocks = [module for module in tiny.model.modules() if hasattr(module, "processor")]
    seen = [0]

    def count(module: nn.Module, args: Any) -> None:
        seen[0] += 1
        if seen[0] == call:
            raise error

    hook = blocks[-1].register_forward_pre_hook(count)
    with pytest.raises(error):
        tiny(prompt_embeds=tiny.call["prompt_embeds"] * 3)
    hook.remove()


def cut(tiny: Any, where: str, error: type[BaseException]) -> None:
    kind, _, at = where.partition(" ")
    (cut_in_callback if kind == "callback" else cut_in_forward)(tiny, int(at), error)


PLACES = ("callback 0", "callback 1", "callback 2", "forward 1", "forward 2", "forward 3", "forward 4")


@pytest.mark.combination(
    "Runs", "interrupted by an exception or Ctrl-C in mid-run", "works", "the next run equals a fresh one bit for bit"
)
@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_run_after_an_interruption(
    make: Any, sparse_of: Any, dense_of: Any, family: str, error: type[BaseException], where: str
) -> None:
    tiny = make(family)
    with tiny.enabled():
        cut(tiny, where, error)
        assert torch.equal(tiny(), sparse_of(family))
    cut(tiny, where, error)
    assert torch.equal(tiny(), dense_of(family))


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_warm_up_step_hides_an_old_plan(make: Any, family: str, where: str) -> None:
    tiny = make(family)
    with tiny.enabled(warmup=0.0, score="mean_pool") as handle:
        expected = tiny()
        cut(tiny, where, Stop)
        assert torch.equal(tiny(), expected)
        assert handle.stats()["transformer"].sparse_calls == handle.stats()["transformer"].calls


@pytest.mark.combination("Runs", "`pipe._interrupt = True` from a callback", "works")
def test_the_pipelines_own_interruption(wan: Any, sparse_of: Any) -> None:
    def callback(pipe: Any, at: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = at == 1
        return {}

    with wan.enabled() as handle:
        wan(callback_on_step_end=callback, prompt_embeds=wan.call["prompt_embeds"] * 3)
        assert torch.equal(wan(), sparse_of("wan"))
        assert handle.stats()["transformer"].calls == 4 * 2 * 2


def test_a_pipeline_that_says_nothing_of_its_steps(dit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left is its schedule, which each run makes anew."""
    with dit.enabled(warmup=0.0, score="mean_pool") as handle:
        expected = dit()
        assert handle.stats()["transformer"].sparse_density < 0.5
        with monkeypatch.context() as patch:
            patch.setattr(dit.pipe.scheduler, "step", _raise(Stop))
            with pytest.raises(Stop):
                dit(class_labels=[2])
        assert torch.equal(dit(), expected)


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
def test_disabled_after_an_interruption(wan: Any, dense_of: Any, error: type[BaseException]) -> None:
    hook = wan.model.blocks[1].register_forward_pre_hook(_raise(error))
    with pytest.raises(error), wan.enabled():
        wan()
    hook.remove()
    wan.check_restored()
    assert torch.equal(wan(), dense_of("wan"))


def _raise(error: type[BaseException]) -> Callable[..., None]:
    def hook(*args: Any, **kwargs: Any) -> None:
        raise error

    return hook


def in_thread(call: Callable[[], Any]) -> Any:
    """What ``call`` returns or raises, in a thread of its own."""
    found: list[Any] = []

    def work() -> None:
        try:
            found.append(call())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    return found[0]


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
def test_another_thread_may_run_after_an_interruption(wan: Any, sparse_of: Any, error: type[BaseException]) -> None:
    with wan.enabled():
        cut_in_forward(wan, 3, error)
        assert torch.equal(in_thread(wan), sparse_of("wan"))
        cut_in_callback(wan, 1, error)
        assert torch.equal(in_thread(wan), sparse_of("wan"))


@pytest.mark.combination("Threads", "runs one after the other in different threads", "works")
def test_threads_one_after_the_other(wan: Any, sparse_of: Any) -> None:
    with wan.enabled():
        for _ in range(2):
            assert torch.equal(in_thread(wan), sparse_of("wan"))
        assert torch.equal(wan(), sparse_of("wan"))


@pytest.mark.combination(
    "Threads", "two runs of one transformer at once", "refused", "RuntimeError in the thread that comes second"
)
@pytest.mark.parametrize("between", [False, True], ids=["within a call", "between calls"])
def test_two_threads_in_one_transformer(wan: Any, sparse_of: Any, between: bool) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        if not inside.is_set():
            inside.set()
            assert go_on.wait(60)

    def callback(pipe: Any, at: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if at == 1:
            wait()
        return {}

    twin = diffusers.WanPipeline(**{**wan.pipe.components, "scheduler": type(wan.pipe.scheduler)(shift=3.0)})
    twin.set_progress_bar_config(disable=True)
    with wan.enabled():
        hook = None if between else wan.model.blocks[1].register_forward_pre_hook(lambda module, args: wait())
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(wan(callback_on_step_end=callback)), name="first")
        thread.start()
        assert inside.wait(60)
        with pytest.raises(RuntimeError, match="thread first is (inside it|in the middle of a run of it)"):
            wan(twin)
        go_on.set()
        thread.join(60)
        # The thread that was there first is none the worse for it.
        assert torch.equal(found[0], sparse_of("wan"))
        if hook is not None:
            hook.remove()
        assert torch.equal(wan(twin), sparse_of("wan"))


class Pipeline:
    """Waits in its call, and then with it over."""

    def __init__(self, module: nn.Module) -> None:
        self.transformer = module
        self.inside, self.leave, self.idle, self.end = (threading.Event() for _ in range(4))

    def __call__(self) -> None:
        self.inside.set()
        assert self.leave.wait(60)

    def work(self) -> None:
        self()
        self.idle.set()
        assert self.end.wait(60)


@pytest.mark.parametrize("compiled", [False, True])
def test_who_is_in_a_run(wan: Any, compiled: bool) -> None:
    """A worker that holds a pipeline is in a run only while it calls it."""
    pipe = Pipeline(torch.compile(wan.model) if compiled else wan.model)
    thread = threading.Thread(target=pipe.work)
    thread.start()
    assert pipe.inside.wait(60)
    assert whereabouts(thread, wan.model, claimed=False) == "in the middle of a run of it"
    assert whereabouts(thread, wan.pipe.vae, claimed=False) is None
    pipe.leave.set()
    assert pipe.idle.wait(60)
    assert whereabouts(thread, wan.model, claimed=True) is None
    pipe.end.set()
    thread.join(60)
    assert whereabouts(thread, wan.model, claimed=True) is None


@pytest.mark.combination("Threads", "two models in two threads", "works")
def test_two_models_in_two_threads(make: Any, sparse_of: Any) -> None:
    pairs = [(make("wan"), "wan"), (make("flux"), "flux"), (make("wan"), "wan")]
    expected = {name: sparse_of(name) for _, name in pairs}
    found: dict[int, Any] = {}

    def work(index: int) -> None:
        found[index] = [pairs[index][0]() for _ in range(2)]

    handles = [tiny.enable() for tiny, _ in pairs]
    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(pairs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for index, (tiny, name) in enumerate(pairs):
        assert all(torch.equal(out, expected[name]) for out in found[index])
        handles[index].disable()
        tiny.check_restored()


@pytest.mark.combination("Threads", "a loop whose steps run in changing threads", "works")
def test_steps_in_changing_threads(wan: Any) -> None:
    """As servers run generators: each step in whatever thread of a pool is free."""

    def loop() -> Any:
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(1, 4, 5, 16, 16, generator=generator)
        text = wan.call["prompt_embeds"]
        for t in (900.0, 700.0, 400.0, 100.0):
            with torch.no_grad():
                noise = wan.model(latents, torch.tensor([t]), text, return_dict=False)[0]
            latents = latents - 0.2 * noise
            yield latents

    with wan.enabled():
        *_, expected = loop()
        steps = loop()
        for _ in range(4):
            out = in_thread(lambda: next(steps))
        assert torch.equal(out, expected)
