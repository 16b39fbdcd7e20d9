"""`torch.compile`: one graph for all layers, none after the first step, same result; and CUDA graphs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import dit_accel
from dit_accel.runtime import ModelRun

CLOSE = {"rtol": 1e-3, "atol": 1e-3}


@pytest.fixture(autouse=True)
def _forgets() -> Iterator[None]:
    """Each test compiles anew, and giving up on compiling is an error."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


def _same_graphs(tiny: Any, counter: Any, graphs: int) -> torch.Tensor:
    """One run that compiles and one that may not."""
    out = tiny()
    assert counter.frame_count == graphs
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(tiny(), out)
    assert counter.frame_count == graphs
    return out


@pytest.mark.combination(
    "torch.compile",
    "`compile_repeated_blocks(fullgraph=True)`",
    "works",
    "one graph for all layers, none after the first step",
)
@pytest.mark.parametrize(
    ("family", "graphs", "first", "backend"), [("wan", 1, "us", "aot_eager"), ("flux", 2, "compile", "eager")]
)
def test_repeated_blocks(
    make: Any, sparse_of: Any, dense_of: Any, ran_sparse: Any, family: str, graphs: int, first: str, backend: str
) -> None:
    tiny, counter = make(family), CompileCounterWithBackend(backend)
    if first == "us":
        handle = tiny.enable()
    tiny.model.compile_repeated_blocks(fullgraph=True, backend=counter)
    if first == "compile":
        handle = tiny.enable()
    torch.testing.assert_close(_same_graphs(tiny, counter, graphs), sparse_of(family), **CLOSE)
    ran_sparse(handle)
    handle.disable()
    tiny.check_restored()
    torch.testing.assert_close(tiny(), dense_of(family), **CLOSE)
    tiny.enable()  # and again, without another graph for it
    compiled = counter.frame_count
    torch.testing.assert_close(tiny(), sparse_of(family), **CLOSE)
    assert counter.frame_count <= compiled + graphs


@pytest.mark.combination(
    "torch.compile",
    "the whole transformer, `fullgraph=True`",
    "works",
    "`torch.compile` and `.compile()`, before or after `enable`",
)
@pytest.mark.parametrize(("how", "first"), [("module.compile", "us"), ("torch.compile", "compile")])
def test_whole(wan: Any, sparse_of: Any, dense_of: Any, ran_sparse: Any, how: str, first: str) -> None:
    counter = CompileCounterWithBackend("eager")
    if first == "us":
        handle = wan.enable()
    if how == "torch.compile":
        wan.pipe.transformer = torch.compile(wan.model, backend=counter, fullgraph=True)
    else:
        wan.model.compile(backend=counter, fullgraph=True)
    if first == "compile":
        handle = wan.enable()
    torch.testing.assert_close(_same_graphs(wan, counter, 1), sparse_of("wan"), **CLOSE)
    status = ran_sparse(handle)
    assert status.calls == 4 * 2 * 2
    handle.disable()
    torch.testing.assert_close(wan(), dense_of("wan"), **CLOSE)


@pytest.mark.combination("torch.compile", "blocks of a model that calls SDPA itself (`fullgraph=True`)", "works")
def test_blocks_of_cogvideox(cogvideox: Any, sparse_of: Any, ran_sparse: Any) -> None:
    counter = CompileCounterWithBackend("eager")
    with cogvideox.enabled() as handle:
        for block in cogvideox.model.transformer_blocks:
            block.compile(backend=counter, fullgraph=True)
        # Without us there are two as well: the first block sees other strides.
        torch.testing.assert_close(_same_graphs(cogvideox, counter, 2), sparse_of("cogvideox"), **CLOSE)
        ran_sparse(handle)


@pytest.mark.combination(
    "torch.compile", "dynamic shapes (`dynamic=True`)", "works", "no graph that the model would not need"
)
def test_dynamic_shapes(wan: Any, ran_sparse: Any, knows_steps: bool) -> None:
    counter = CompileCounterWithBackend("eager")
    sizes = [{}, {"height": 96, "width": 160}, {"num_frames": 9}, {"height": 96}]
    with wan.enabled() as handle:
        expected = [wan(**size) for size in sizes]
        wan.model.compile_repeated_blocks(fullgraph=True, dynamic=True, backend=counter)
        for size, out in zip(sizes, expected, strict=True):
            torch.testing.assert_close(wan(**size), out, **CLOSE)
            ran_sparse(handle)
        # As many as without us: torch takes equal sides, and a RoPE that is a view, for rules and then learns better.
        assert counter.frame_count == (2 if knows_steps else 4)


@pytest.mark.combination("torch.compile", "two accelerated models", "works", "they share the graphs")
def test_two_models_share_graphs(make: Any, sparse_of: Any) -> None:
    counter = CompileCounterWithBackend("eager")
    for _ in range(2):
        tiny = make("wan")
        tiny.enable()
        tiny.model.compile_repeated_blocks(fullgraph=True, backend=counter)
        torch.testing.assert_close(tiny(), sparse_of("wan"), **CLOSE)
    assert counter.frame_count == 1


@pytest.mark.combination("torch.compile", "interrupted in a compiled block", "works", "the next run equals a fresh one")
def test_interrupted(wan: Any, sparse_of: Any) -> None:
    with wan.enabled():
        wan.model.compile_repeated_blocks(fullgraph=True, backend="eager")
        expected = wan()

        def stop(*args: Any) -> None:
            raise KeyboardInterrupt

        hook = wan.model.norm_out.register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            wan(prompt_embeds=wan.call["prompt_embeds"] * 3)
        hook.remove()
        assert torch.equal(wan(), expected)


@pytest.mark.combination("torch.compile", "with a LoRA", "works", "loading one compiles again, its steps do not")
def test_lora(wan: Any, ran_sparse: Any) -> None:
    peft = pytest.importorskip("peft")
    with wan.enabled() as handle:
        wan.model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
        expected = wan()
        counter = CompileCounterWithBackend("eager")
        wan.model.compile_repeated_blocks(fullgraph=True, backend=counter)
        torch.testing.assert_close(_same_graphs(wan, counter, 1), expected, **CLOSE)
        ran_sparse(handle)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on the CPU")
@pytest.mark.combination("torch.compile", "inductor", "works")
def test_inductor(wan: Any, sparse_of: Any, ran_sparse: Any) -> None:
    with wan.enabled() as handle:
        for block in wan.model.blocks:
            block.attn1.compile(fullgraph=True)
        out = wan()
        assert float((out - sparse_of("wan")).norm() / out.norm()) < 1e-3
        ran_sparse(handle)


def test_skipped_scores_in_a_graph(dit: Any) -> None:
    """Whoever takes the place of SDPA while a graph is made has it in the graph."""
    from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode

    with AttentionScoreSkipFunctionMode():
        expected = dit()
        dit.enable()
        for block in dit.model.transformer_blocks:
            block.compile(backend="eager", fullgraph=True)
        torch.testing.assert_close(dit(), expected, **CLOSE)
    dit_accel.disable(dit.pipe)


def _on_gpu(tiny: Any) -> Any:
    tiny.pipe.to("cuda", torch.bfloat16)
    tiny.call = {n: v.to("cuda", torch.bfloat16) if isinstance(v, torch.Tensor) else v for n, v in tiny.call.items()}
    return tiny


@pytest.mark.gpu
@pytest.mark.combination(
    "torch.compile",
    "`mode='reduce-overhead'` (CUDA graphs of inductor)",
    "works",
    "attention stays outside the graphs; call `torch.compiler.cudagraph_mark_step_begin()` before each step",
)
def test_reduce_overhead(wan: Any, ran_sparse: Any) -> None:
    tiny = _on_gpu(wan)
    with tiny.enabled() as handle:
        expected = tiny()
        wanted = _sparse_steps(handle)
        tiny.model.compile_repeated_blocks(fullgraph=True, mode="reduce-overhead")
        # Blocks hand each other what a graph has written; without the mark their outputs count as old, with us or not.
        mark = tiny.model.register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())
        for _ in range(3):
            out = tiny()
            assert float((out - expected).float().norm() / expected.float().norm()) < 3e-2
            ran_sparse(handle)
            assert _sparse_steps(handle) == wanted, "the schedule goes on"
        mark.remove()


@pytest.mark.gpu
@pytest.mark.combination(
    "torch.compile",
    "a CUDA graph captured by hand",
    "works",
    "of a sparse step; a replay repeats the plan of that step",
)
def test_captured_by_hand(wan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = _on_gpu(wan)
    latents = torch.randn(1, 4, 5, 16, 16, device="cuda", dtype=torch.bfloat16)
    call = (latents, torch.tensor([500.0], device="cuda"), tiny.call["prompt_embeds"])
    with tiny.enabled(tiny.model, warmup=0.0) as handle, torch.no_grad():
        tiny.model(*call)
        tiny.model(*call)  # a step later: sparse, with the plan of the first
        expected = tiny.model(*call).sample
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = tiny.model(*call).sample
        assert handle.stats()["transformer"].sparse_calls > 0
        for name in ("begin_forward", "attend", "again"):
            monkeypatch.setattr(ModelRun, name, _never)
        graph.replay()  # which runs no Python of ours
        torch.cuda.synchronize()
        assert torch.equal(out, expected)


def _sparse_steps(handle: Any) -> list[int]:
    return [step for step, density in handle.stats()["transformer"].density_by_step.items() if density < 1]


def _never(*_: Any, **__: Any) -> Any:
    raise AssertionError("a replayed graph ran Python")
