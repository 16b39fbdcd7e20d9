from __future__ import annotations

import itertools
import logging

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig

from dit_accel_patches.flux import ADAPTER as FLUX
from dit_accel_patches.install import install
from dit_accel_patches.wan import ADAPTER as WAN


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.name.startswith("dit_accel")]


ORDERS = [
    order
    for order in itertools.permutations(["install", "cache", "undo", "uncache"])
    if order.index("install") < order.index("undo") and order.index("cache") < order.index("uncache")
]


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_first_block_cache_in_every_order(wan, make_run, processors, order):
    before, expected = processors(wan.model), wan(num_inference_steps=3)
    config = FirstBlockCacheConfig(threshold=1e-9)
    run, installation = make_run(), None
    for act in order:
        if act == "install":
            installation = install(wan.model, WAN, run)
        elif act == "undo":
            installation.undo()
        elif act == "cache":
            wan.model.enable_cache(config)
        else:
            wan.model.disable_cache()
        calls = len(run.calls)
        assert torch.equal(wan(num_inference_steps=3), expected)
        installed = "_dit_accel" in wan.model.__dict__
        assert (len(run.calls) > calls) == installed
    assert all(processors(wan.model)[name] is before[name] for name in before)
    assert run.steps[:6] == [(s, b) for s in range(3) for b in ("cond", "uncond")]


def test_first_block_cache_skips_layers_but_not_steps(wan, make_run):
    wan.model.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    run = make_run()
    install(wan.model, WAN, run)
    wan(num_inference_steps=3)
    assert run.steps == [(s, b) for s in range(3) for b in ("cond", "uncond")]
    assert run.layers.count(0) > run.layers.count(1)
    assert {c.step.step for c in run.calls if c.layer == 0} == {0, 1, 2}


def test_foreign_hook_with_new_forward_survives_undo(wan, make_run):
    from diffusers.hooks import HookRegistry, ModelHook

    class Doubled(ModelHook):
        def new_forward(self, module, *args, **kwargs):
            return tuple(2 * x for x in self.fn_ref.original_forward(*args, **kwargs))

    plain = wan(num_inference_steps=1)
    installation = install(wan.model, WAN, make_run())
    registry = HookRegistry.check_if_exists_or_initialize(wan.model)
    registry.register_hook(Doubled(), "doubled")
    doubled = wan(num_inference_steps=1)
    assert not torch.equal(plain, doubled)
    installation.undo()
    assert torch.equal(wan(num_inference_steps=1), doubled)
    registry.remove_hook("doubled")
    assert torch.equal(wan(num_inference_steps=1), plain)


def test_foreign_removal_of_our_hook_does_no_harm(wan, make_run):
    expected = wan()
    run = make_run()
    installation = install(wan.model, WAN, run)
    wan.model._diffusers_hook.remove_hook("dit_accel")
    assert torch.equal(wan(), expected)
    assert {s.source for _, s in run.forwards} == {"timestep"}
    installation.undo()
    assert torch.equal(wan(), expected)


def test_pyramid_attention_broadcast(wan, make_run):
    run = make_run()
    installation = install(wan.model, WAN, run)
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        spatial_attention_block_identifiers=("blocks",),
        current_timestep_callback=lambda: 500,
    )
    wan.model.enable_cache(config)
    wan(num_inference_steps=4)
    assert 0 < len(run.calls) < 16
    assert [s for s, _ in run.steps] == [0, 0, 1, 1, 2, 2, 3, 3]
    installation.undo()
    wan.model.disable_cache()


def test_layer_skip_knows_the_wrapped_processors(flux, make_run):
    """Stock Flux cannot skip attention in 0.42 (``is_cross_attention`` is missing), so the look-up is tested itself."""
    from diffusers.hooks._helpers import AttentionProcessorRegistry

    kind = type(flux.model.transformer_blocks[0].attn.processor)
    install(flux.model, FLUX, make_run())
    wrapped = type(flux.model.transformer_blocks[0].attn.processor)
    assert wrapped is not kind
    assert AttentionProcessorRegistry.get(wrapped) == AttentionProcessorRegistry.get(kind)


@pytest.mark.parametrize("family", ["wan", "flux"])
def test_fused_projections_keep_the_layers(family, request, make_run, caplog):
    tiny, adapter = request.getfixturevalue(family), {"wan": WAN, "flux": FLUX}[family]
    tiny.model.fuse_qkv_projections()
    expected = tiny()
    tiny.model.unfuse_qkv_projections()
    run = make_run()
    installation = install(tiny.model, adapter, run)
    tiny.model.fuse_qkv_projections()
    with caplog.at_level(logging.WARNING, logger="dit_accel"):
        assert torch.equal(tiny(), expected)
    assert set(run.layers) == set(range(len(installation.layers)))
    assert not warnings_of(caplog)
    installation.undo()
    assert torch.equal(tiny(), expected)


def test_replaced_processors_are_wrapped_again(wan, make_run, caplog):
    kind = type(wan.model.blocks[0].attn1.processor)
    run = make_run()
    installation = install(wan.model, WAN, run)
    mine = kind()
    wan.model.blocks[0].attn1.set_processor(mine)
    wan.model.blocks[1].attn1.processor = wan.model.blocks[0].attn2.processor
    with caplog.at_level(logging.WARNING, logger="dit_accel"):
        wan()
        wan()
    assert set(run.layers) == {0, 1}
    assert len(warnings_of(caplog)) == 1
    assert "processors were replaced by WanAttnProcessor" in warnings_of(caplog)[0]
    assert "2 of 2 layers" in warnings_of(caplog)[0]
    installation.undo()
    # The objects that were set last are what the user chose.
    assert wan.model.blocks[0].attn1.processor is mine
    assert wan.model.blocks[1].attn1.processor is wan.model.blocks[0].attn2.processor


def test_wrapped_processors_may_be_handed_round(wan, make_run):
    expected = wan()
    run = make_run()
    installation = install(wan.model, WAN, run)
    wan.model.set_attn_processor(wan.model.blocks[0].attn1.processor)
    assert torch.equal(wan(), expected)
    assert run.layers == [0, 1] * 4
    installation.undo()
    assert torch.equal(wan(), expected)


def ip_adapter():
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    return FluxIPAdapterAttnProcessor(hidden_size=32, cross_attention_dim=32, num_tokens=(4,))


IP_STATES = {"joint_attention_kwargs": {"ip_hidden_states": [torch.zeros(1, 4, 32)]}}


def test_processors_with_weights_are_left_alone(flux, make_run):
    attention = flux.model.transformer_blocks[0].attn
    adapter = ip_adapter()
    attention.set_processor(adapter)
    run = make_run()
    installation = install(flux.model, FLUX, run)
    assert list(installation.skipped) == ["transformer_blocks.0.attn"]
    flux(num_inference_steps=1, **IP_STATES)
    assert set(run.layers) == {1, 2}
    ((layer, reason),) = run.declined
    assert layer == 0
    assert "FluxIPAdapterAttnProcessor is a module with weights" in reason
    installation.undo()
    assert attention.processor is adapter


def test_processor_with_weights_set_later_is_left_alone_and_said(flux, make_run, caplog):
    run = make_run()
    installation = install(flux.model, FLUX, run)
    attention = flux.model.transformer_blocks[0].attn
    adapter = ip_adapter()
    del attention.processor
    attention.set_processor(adapter)
    with caplog.at_level(logging.WARNING, logger="dit_accel"):
        flux(**IP_STATES)
        flux(**IP_STATES)
    assert set(run.layers) == {1, 2}
    assert {layer for layer, _ in run.declined} == {0}
    assert len(warnings_of(caplog)) == 1
    installation.undo()
    assert attention.processor is adapter


@pytest.mark.parametrize("first", ["lora", "install"])
def test_lora(wan, make_run, first):
    pytest.importorskip("peft")
    from peft import LoraConfig

    def add():
        torch.manual_seed(5)
        config = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        wan.model.add_adapter(config)

    run = make_run()
    if first == "lora":
        plain = wan()
        add()
        expected = wan()
        assert not torch.equal(plain, expected)
        installation = install(wan.model, WAN, run)
    else:
        installation = install(wan.model, WAN, run)
        plain = wan()
        add()
        expected = None
    out = wan()
    assert run.layers[-8:] == [0, 1] * 4
    installation.undo()
    assert torch.equal(wan(), out)
    assert expected is None or torch.equal(out, expected)
    wan.model.delete_adapters(["default"])
    assert torch.equal(wan(), plain)


def test_group_offload(wan, make_run):
    expected = wan()
    run = make_run()
    installation = install(wan.model, WAN, run)
    wan.model.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )
    assert torch.equal(wan(), expected)
    assert len(run.calls) == 8
    installation.undo()
    assert torch.equal(wan(), expected)


def test_layerwise_casting(wan, make_run):
    wan.model.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    expected = wan()
    run = make_run()
    installation = install(wan.model, WAN, run)
    assert torch.equal(wan(), expected)
    assert len(run.calls) == 8
    installation.undo()
    assert torch.equal(wan(), expected)


def test_shared_transformer_of_a_second_pipeline(wan, make_run):
    run = make_run()
    install(wan.model, WAN, run, pipe=wan.pipe)
    wan()
    twin = type(wan.pipe)(**wan.pipe.components)
    wan.pipe = twin
    wan.pipe.set_progress_bar_config(disable=True)
    wan()
    assert run.steps == [(0, "cond"), (0, "uncond"), (1, "cond"), (1, "uncond")] * 2
    assert run.resets == 2
