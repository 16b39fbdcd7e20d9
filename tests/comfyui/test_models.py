"""Models of Wan's and FLUX's shape, sampled with and without the node, under both contracts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from comfy_fakes import Flux, Patcher, Prompt, WanModel, prompt, sample

from dit_accel_patches.comfyui.patching import accelerate, decelerate, session_of
from dit_accel_patches.comfyui.settings import Settings

ALL = Settings(quality="custom", density=1.0, min_tokens=0)
SOME = Settings(quality="custom", density=0.3, min_tokens=0)
ONCE = replace(SOME, method="union")  # plans once, at the end of the warm-up


def wan(core: str, **options: Any) -> tuple[Patcher, torch.Tensor, list[Prompt]]:
    """512 video tokens."""
    torch.manual_seed(0)
    model = WanModel(core, **options).eval()
    width = model.patch_embedding.out_channels
    return Patcher(model, core), torch.randn(1, 4, 2, 32, 32), [prompt(7, width, 1), prompt(7, width, 2)]


def flux(core: str, lengths: tuple[int, ...] = (9, 9), **options: Any) -> tuple[Patcher, torch.Tensor, list[Prompt]]:
    """576 image tokens in a latent of odd size, and a reference of 16."""
    torch.manual_seed(0)
    model = Flux(core, **options).eval()
    width = model.img_in.out_channels
    references = {"ref_latents": [torch.randn(1, 4, 8, 8)]}
    prompts = [prompt(length, width, seed, **references) for seed, length in enumerate(lengths)]
    return Patcher(model, core), torch.randn(1, 4, 47, 48), prompts


MAKERS = {"wan": wan, "flux": flux}


@pytest.mark.parametrize("kind", list(MAKERS))
@pytest.mark.parametrize("batched", [False, True])
def test_density_one_equals_dense(core: str, kind: str, batched: bool) -> None:
    patcher, noise, prompts = MAKERS[kind](core)
    if batched and kind == "flux":
        prompts = [replace(p, more={}) for p in prompts]
    dense = sample(patcher, noise, prompts, batched=batched)
    fast = accelerate(patcher, ALL)
    got = sample(fast, noise, prompts, batched=batched)
    statuses = session_of(fast).status()
    assert sum(s.sparse_calls for s in statuses) > 0
    assert not any(s.reasons.keys() - {"warm-up", "planning step"} for s in statuses)
    torch.testing.assert_close(got, dense, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("kind", list(MAKERS))
def test_sparse_differs_and_is_counted(core: str, kind: str) -> None:
    patcher, noise, prompts = MAKERS[kind](core)
    dense = sample(patcher, noise, prompts)
    fast = accelerate(patcher, SOME)
    got = sample(fast, noise, prompts)
    assert torch.isfinite(got).all()
    assert (got - dense).abs().max() > 1e-3
    (status,) = session_of(fast).status()
    layers = {"wan": 2, "flux": 3}[kind]
    assert status.calls == 5 * 2 * layers  # steps, conditionings, self-attentions: text attention is not counted
    assert status.sparse_calls == 4 * 2 * layers  # the first of five steps is the warm-up, where the plan is made
    assert 0.2 < status.sparse_density < 0.5
    assert [layer.sparse for layer in status.layers] == [8] * layers
    names = {"wan": ["blocks.0", "blocks.1"], "flux": ["double_blocks.0", "single_blocks.0", "single_blocks.1"]}
    assert [layer.name for layer in status.layers] == names[kind]
    expected = {"wan": "2x16x16", "flux": "1x24x24 (+9 text, +16 behind)"}[kind]
    assert status.geometry == expected


def test_without_the_node_nothing_is_left(core: str) -> None:
    patcher, noise, prompts = wan(core)
    dense = sample(patcher, noise, prompts)
    fast = accelerate(patcher, SOME)
    sample(fast, noise, prompts)
    assert torch.equal(sample(patcher, noise, prompts), dense)
    assert torch.equal(sample(decelerate(fast), noise, prompts), dense)
    assert patcher.model_options == {"transformer_options": {}}
    assert not patcher.wrappers
    assert not patcher.callbacks


def test_two_nodes_do_not_affect_one_another(core: str) -> None:
    patcher, noise, prompts = wan(core)
    some, every = accelerate(patcher, SOME), accelerate(patcher, ALL)
    alone = sample(accelerate(patcher, SOME), noise, prompts)
    dense = sample(patcher, noise, prompts)
    torch.testing.assert_close(sample(every, noise, prompts), dense, rtol=2e-4, atol=2e-4)
    assert torch.equal(sample(some, noise, prompts), alone)
    torch.testing.assert_close(sample(every, noise, prompts), dense, rtol=2e-4, atol=2e-4)


def test_the_last_node_counts(core: str) -> None:
    patcher, noise, prompts = wan(core)
    alone = sample(accelerate(patcher, SOME), noise, prompts)
    twice = accelerate(accelerate(patcher, ALL), SOME)
    assert torch.equal(sample(twice, noise, prompts), alone)
    assert len(twice.wrappers["diffusion_model"]["dit_accel"]) == 1


def test_clones_share_no_cache_and_give_the_same(core: str) -> None:
    """What a LoRA loader does after the node: clone the patched model."""
    patcher, noise, prompts = wan(core)
    fast = accelerate(patcher, SOME)
    first = sample(fast, noise, prompts)
    clone = fast.clone()
    assert session_of(clone) is session_of(fast)
    assert torch.equal(sample(clone, noise, prompts), first)


def test_batched_and_split_conditionings_agree(core: str) -> None:
    patcher, noise, prompts = wan(core)
    settings = replace(SOME, method="na", quality="custom")  # its mask does not depend on the other conditioning
    split = sample(accelerate(patcher, settings), noise, prompts)
    batched = sample(accelerate(patcher, settings), noise, prompts, batched=True)
    torch.testing.assert_close(batched, split, rtol=1e-4, atol=1e-4)


def test_prompts_of_different_length_keep_their_plans(core: str) -> None:
    patcher, noise, prompts = flux(core, lengths=(9, 14))
    fast = accelerate(patcher, ONCE)
    sample(fast, noise, prompts)
    statuses = session_of(fast).status()
    assert sorted(s.geometry for s in statuses) == ["1x24x24 (+14 text, +16 behind)", "1x24x24 (+9 text, +16 behind)"]
    assert [s.plans for s in statuses] == [3, 3]  # one for each layer, not one for each step
    assert [s.sparse_calls for s in statuses] == [12, 12]


@pytest.mark.parametrize("dim", [64, 96, 128])
def test_head_sizes(dim: int) -> None:
    patcher, noise, prompts = wan("new", heads=1, dim=dim)
    fast = accelerate(patcher, ALL)
    torch.testing.assert_close(sample(fast, noise, prompts), sample(patcher, noise, prompts), rtol=2e-4, atol=2e-4)
    (status,) = session_of(fast).status()
    assert status.sparse_calls == 16


def test_window_of_the_schedule(core: str) -> None:
    patcher, noise, prompts = wan(core)
    fast = accelerate(patcher, replace(SOME, start_percent=0.4, end_percent=0.8))
    sample(fast, noise, prompts[:1], steps=10)
    (status,) = session_of(fast).status()
    dense = {step for step, share in status.density_by_step.items() if share >= 1}
    assert dense == {0, 1, 2, 3, 9}  # sigma 0.6 and 0.2 bound the window, both included


def test_second_half_of_the_schedule_has_no_warm_up(core: str) -> None:
    """Wan 2.2's second model, or KSampler (Advanced) from a later step."""
    patcher, noise, prompts = wan(core)
    fast = accelerate(patcher, SOME)
    sample(fast, noise, prompts[:1], sigmas=torch.linspace(0.5, 0, 5))
    (status,) = session_of(fast).status()
    assert status.sparse_calls == 8
    assert not status.reasons


def test_dense_blocks(core: str) -> None:
    patcher, noise, prompts = flux(core)
    fast = accelerate(patcher, replace(SOME, dense_blocks=(0, 2)))
    sample(fast, noise, prompts)
    (status,) = session_of(fast).status()
    assert [layer.sparse for layer in status.layers] == [0, 8, 0]
    assert status.reasons["dense layer"] == 20


def test_a_block_that_attends_twice(core: str) -> None:
    """VACE's side branch attends in the block that it belongs to."""
    patcher, noise, prompts = wan(core, twice=(0,))
    fast = accelerate(patcher, ONCE)
    sample(fast, noise, prompts[:1])
    (status,) = session_of(fast).status()
    assert [layer.sparse for layer in status.layers] == [4, 4, 4]
    assert status.plans == 3
    if core == "new":
        assert status.layers[2].name == "blocks.0 (call 2)"


def test_skipped_steps_and_blocks(core: str) -> None:
    """Cache nodes leave out steps, skip-layer guidance leaves out blocks."""
    patcher, noise, prompts = wan(core, blocks=3)
    fast = accelerate(patcher, SOME)

    def each(step: int, _: dict[str, Any]) -> None:
        patcher.model.skip = {0: set(), 1: {0, 1, 2}, 2: {1}}.get(step, set())

    assert torch.isfinite(sample(fast, noise, prompts, each=each)).all()
    (status,) = session_of(fast).status()
    assert status.calls == 2 * (3 + 0 + 2 + 3 + 3)
    if core == "new":  # the block says who it is, so that its neighbour's plan is not taken
        assert [layer.sparse for layer in status.layers] == [6, 4, 6]


def test_windows_and_tiles_have_plans_of_their_own(core: str) -> None:
    patcher, noise, prompts = wan(core)
    fast = accelerate(patcher, ONCE)
    sample(fast, noise, prompts[:1], windows=3)
    (status,) = session_of(fast).status()
    assert status.plans == 2 * 3
    assert status.sparse_calls == 2 * 3 * 4


def test_key_masks_are_respected(core: str) -> None:
    patcher, noise, prompts = flux(core)
    tokens = 9 + 24 * 24 + 16
    hidden = torch.zeros(1, 1, tokens)
    hidden[..., 4:9] = torch.finfo(torch.float32).min
    prompts = [replace(p, more={**p.more, "attention_mask": hidden}) for p in prompts]
    fast = accelerate(patcher, ALL)
    torch.testing.assert_close(sample(fast, noise, prompts), sample(patcher, noise, prompts), rtol=2e-4, atol=2e-4)
    assert session_of(fast).status()[0].sparse_calls == 24


def test_other_masks_stay_dense_with_a_reason(core: str, messages: pytest.LogCaptureFixture) -> None:
    patcher, noise, prompts = flux(core)
    tokens = 9 + 24 * 24 + 16
    weighed = torch.rand(1, tokens, tokens)
    prompts = [replace(p, more={**p.more, "attention_mask": weighed}) for p in prompts]
    fast = accelerate(patcher, SOME)
    assert torch.equal(sample(fast, noise, prompts), sample(patcher, noise, prompts))
    (status,) = session_of(fast).status()
    assert status.reasons == {"the mask differs from query to query": 30}
    assert sum("the mask differs from query to query" in r.getMessage() for r in messages.records) == 1


def test_unknown_tokens_stay_dense_with_a_reason(core: str, messages: pytest.LogCaptureFixture) -> None:
    patcher, noise, prompts = flux(core)
    fast = accelerate(patcher, SOME)
    original = patcher.model._forward

    def longer(x, timestep, context, *rest, **kwargs):  # type: ignore[no-untyped-def]
        return original(x, timestep, torch.cat([context, context[:, :3]], 1), *rest, **kwargs)

    patcher.model._forward = longer
    assert torch.equal(sample(fast, noise, prompts), sample(patcher, noise, prompts))
    (status,) = session_of(fast).status()
    (reason,) = status.reasons
    assert reason.startswith("the sequence has 604 tokens, expected 9 + 576 + 16")
    assert sum("expected 9 + 576 + 16" in r.getMessage() for r in messages.records) == 1


@pytest.mark.parametrize("precision", ["bfloat16", "int8_fp8"])
def test_precision_of_sparse_calls(precision: str, core: str) -> None:
    patcher, noise, prompts = wan(core)
    exact = sample(patcher, noise, prompts)
    fast = accelerate(patcher, replace(ALL, precision=precision))
    got = sample(fast, noise, prompts)
    assert got.dtype == torch.float32
    assert 1e-5 < (got - exact).abs().max() < 0.1


def test_short_sequences_stay_dense(core: str) -> None:
    patcher, noise, prompts = wan(core)
    fast = accelerate(patcher, replace(SOME, min_tokens=513))
    assert torch.equal(sample(fast, noise, prompts), sample(patcher, noise, prompts))
    assert "512 tokens are fewer than min_tokens=513" in session_of(fast).status()[0].reasons


def test_an_interrupted_run_leaves_no_plan(core: str) -> None:
    patcher, noise, prompts = wan(core)
    fast = accelerate(patcher, SOME)
    whole = sample(fast, noise, prompts)

    def each(step: int, _: dict[str, Any]) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(fast, noise, prompts, each=each)
    assert not session_of(fast)._runs
    assert torch.equal(sample(fast, noise, prompts), whole)


def test_runs_without_callbacks_do_not_mix(core: str) -> None:
    """Custom samplers may call a second model whose patcher is never told of start and end."""
    patcher, noise, prompts = wan(core)
    fast = accelerate(patcher, SOME)
    expected = sample(fast, noise, prompts)
    fast.callbacks.clear()
    for _ in range(2):
        assert torch.equal(sample(fast, noise, prompts), expected)


def test_models_that_are_compiled(core: str) -> None:
    patcher, noise, prompts = wan(core)
    fast = accelerate(patcher, SOME)
    expected = sample(fast, noise, prompts)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    patcher.model.compile(backend=backend)
    torch.testing.assert_close(sample(fast, noise, prompts), expected, rtol=1e-5, atol=1e-5)
    assert graphs
    count = len(graphs)
    sample(fast, noise, prompts)
    torch._dynamo.reset()
    assert len(graphs) <= 2 * count
