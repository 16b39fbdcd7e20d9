from __future__ import annotations

import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from dit_accel_patches.flux import ADAPTER as FLUX
from dit_accel_patches.install import install
from dit_accel_patches.wan import ADAPTER as WAN


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def forward(model, inputs, timestep=900.0):
    with torch.no_grad():
        return model(**{**inputs, "timestep": torch.tensor([timestep])}, return_dict=False)[0]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_one_graph_serves_all_layers(make_wan, make_run, wan_inputs, backend):
    model, run = make_wan(12), make_run()
    expected = forward(model, wan_inputs)
    install(model, WAN, run)
    counter = CompileCounterWithBackend(backend)
    for block in model.blocks:
        block.compile(backend=counter, fullgraph=True)
    torch.testing.assert_close(forward(model, wan_inputs), expected)
    assert counter.frame_count == 1
    assert run.layers == list(range(12))
    forward(model, wan_inputs, 500.0)
    assert counter.frame_count == 1
    assert run.steps == [(0, "cond"), (1, "cond")]


def test_a_second_accelerated_model_shares_the_graph(make_wan, make_run, wan_inputs):
    counter = CompileCounterWithBackend("eager")
    runs = []
    for _ in range(2):
        model, run = make_wan(), make_run()
        runs.append(run)
        install(model, WAN, run)
        for block in model.blocks:
            block.compile(backend=counter, fullgraph=True)
        forward(model, wan_inputs)
    assert [run.layers for run in runs] == [[0, 1], [0, 1]]
    assert counter.frame_count == 1


def test_compile_repeated_blocks_of_flux_adds_no_graph(flux, make_run):
    plain = CompileCounterWithBackend("eager")
    flux.model.compile_repeated_blocks(backend=plain, fullgraph=True)
    expected = flux()
    torch._dynamo.reset()
    run = make_run()
    install(flux.model, FLUX, run, pipe=flux.pipe)
    counter = CompileCounterWithBackend("eager")
    flux.model.compile_repeated_blocks(backend=counter, fullgraph=True)
    assert torch.equal(flux(), expected)
    # A double and a single block, and the other strides that the first single block sees.
    assert counter.frame_count == plain.frame_count == 3
    assert run.layers == [0, 1, 2] * 3


@pytest.mark.parametrize("how", ["module.compile", "torch.compile"])
@pytest.mark.parametrize("first", ["install", "compile"])
def test_whole_module(make_wan, make_run, wan_inputs, how, first):
    model, run = make_wan(3), make_run()
    expected = forward(model, wan_inputs)
    counter = CompileCounterWithBackend("eager")

    def compiled():
        if how == "module.compile":
            model.compile(backend=counter, fullgraph=True)
            return model
        return torch.compile(model, backend=counter, fullgraph=True)

    called = compiled() if first == "compile" else model
    install(called, WAN, run)
    called = compiled() if first == "install" else called
    torch.testing.assert_close(forward(called, wan_inputs), expected)
    for timestep in (900.0, 500.0, 500.0):
        forward(called, wan_inputs, timestep)
    assert counter.frame_count == 1
    assert run.steps == [(0, "cond"), (0, "uncond"), (1, "cond"), (1, "uncond")]
    assert [c.step.step for c in run.calls] == [0] * 6 + [1] * 6
    assert run.layers == [0, 1, 2] * 4


def test_undo_after_compile_runs_the_models_own_processors(make_wan, make_run, wan_inputs):
    model, run = make_wan(), make_run("zeros")
    expected = forward(model, wan_inputs)
    installation = install(model, WAN, run)
    for block in model.blocks:
        block.compile(backend="eager", fullgraph=True)
    assert not torch.equal(forward(model, wan_inputs), expected)
    installation.undo()
    calls = len(run.calls)
    torch.testing.assert_close(forward(model, wan_inputs), expected)
    assert len(run.calls) == calls


def test_graph_break_inside_a_block_keeps_the_layer(make_wan, make_run, wan_inputs):
    model, run = make_wan(), make_run()

    class Broken(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            torch._dynamo.graph_break()
            return self.inner(x)

    for block in model.blocks:
        block.attn1.norm_q = Broken(block.attn1.norm_q)
    expected = forward(model, wan_inputs)
    install(model, WAN, run)
    for block in model.blocks:
        block.compile(backend="eager")
    torch.testing.assert_close(forward(model, wan_inputs), expected)
    assert run.layers == [0, 1]


def test_operator_meets_the_rules_of_custom_operators(make_wan, make_run, wan_inputs):
    from dit_accel_patches.processor import handle_of

    model = make_wan()
    install(model, WAN, make_run())
    handle = handle_of(model.blocks[0].attn1.processor)
    q, k, v = (torch.randn(2, 6, 2, 8) for _ in range(3))
    mask = torch.ones(2, 1, 1, 6, dtype=torch.bool)
    for arguments in (
        (q, k, v, handle.layer, None, None, False, False),
        (q, k, v, handle.layer, mask, 0.5, False, False),
        (q, k[:, :4], v[:, :4], handle.layer, None, None, False, False),
        (*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)), handle.layer, None, None, False, False),
    ):
        torch.library.opcheck(torch.ops.dit_accel.attend, arguments)


def test_other_resolution_recompiles_with_the_right_geometry(make_wan, make_run, wan_inputs):
    model, run = make_wan(3), make_run()
    larger = {**wan_inputs, "hidden_states": torch.randn(1, 16, 3, 6, 8)}
    expected = [forward(model, wan_inputs), forward(model, larger)]
    install(model, WAN, run)
    counter = CompileCounterWithBackend("aot_eager")
    for block in model.blocks:
        block.compile(backend=counter, fullgraph=True)
    torch.testing.assert_close(forward(model, wan_inputs), expected[0])
    torch.testing.assert_close(forward(model, larger), expected[1])
    # One for the first size, one for any other.
    assert counter.frame_count == 2
    assert [g.grid for g, _ in run.forwards] == [(3, 2, 3), (3, 3, 4)]
    assert run.resets == 1
    assert [c.shape[1] for c in run.calls] == [18] * 3 + [36] * 3


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on the CPU")
def test_inductor(make_wan, make_run, wan_inputs):
    model, run = make_wan(3), make_run()
    expected = forward(model, wan_inputs)
    install(model, WAN, run)
    for block in model.blocks:
        block.attn1.compile(fullgraph=True)
    torch.testing.assert_close(forward(model, wan_inputs), expected, atol=1e-4, rtol=1e-4)
    assert run.layers == [0, 1, 2]
