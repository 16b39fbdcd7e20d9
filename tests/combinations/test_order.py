"""Switching on and off: twice, in any order, in both transformers, one transformer in two pipelines."""

from __future__ import annotations

import itertools
from typing import Any

import diffusers
import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig

import dit_accel


@pytest.mark.combination("Switching", "`enable` twice", "works", "the second replaces the first")
def test_enable_twice(wan: Any, sparse_of: Any, ran_sparse: Any) -> None:
    first = wan.enable(density=0.9)
    second = wan.enable()
    assert not first.active
    assert torch.equal(wan(), sparse_of("wan"))
    ran_sparse(second)
    first.disable()  # an old handle takes nothing of the new one along
    assert torch.equal(wan(), sparse_of("wan"))
    second.disable()
    wan.check_restored()


# Each neighbour changes the transformer in a way of its own: a hook of diffusers that replaces `forward`, one of accelerate
# that does so, processors, hooks of torch, compiled forwards.
def _cache_on(tiny: Any) -> None:
    tiny.model.enable_cache(FirstBlockCacheConfig(threshold=1e-9))


def _offload_on(tiny: Any) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    add_hook_to_module(tiny.model, AlignDevicesHook("cpu", io_same_device=True), append=True)


def _offload_off(tiny: Any) -> None:
    from accelerate.hooks import remove_hook_from_module

    remove_hook_from_module(tiny.model)


def _hook_on(tiny: Any) -> None:
    tiny.mine = tiny.model.register_forward_pre_hook(lambda module, args: None)


def _group_on(tiny: Any) -> None:
    tiny.group_offload(tiny.model)


def _group_off(tiny: Any) -> None:
    for module in tiny.model.modules():
        registry = getattr(module, "_diffusers_hook", None)
        for name in [name for name in getattr(registry, "hooks", ()) if "offload" in name]:
            registry.remove_hook(name, recurse=False)


NEIGHBOURS = {
    "cache": (_cache_on, lambda tiny: tiny.model.disable_cache()),
    "accelerate": (_offload_on, _offload_off),
    "torch hook": (_hook_on, lambda tiny: tiny.mine.remove()),
    "group offload": (_group_on, _group_off),
}

ORDERS = [
    order
    for order in itertools.permutations(["+us", "+other", "-us", "-other"])
    if order.index("+us") < order.index("-us") and order.index("+other") < order.index("-other")
]


@pytest.mark.combination(
    "Switching", "on and off in any order with other hooks", "works", "each leaves what the other has put there"
)
@pytest.mark.parametrize("order", ORDERS, ids=" ".join)
@pytest.mark.parametrize("neighbour", NEIGHBOURS)
def test_any_order(
    wan: Any, dense_of: Any, sparse_of: Any, group_offload: Any, neighbour: str, order: tuple[str, ...]
) -> None:
    on, off = NEIGHBOURS[neighbour]
    wan.group_offload = group_offload
    active = False
    for act in order:
        if act == "+us":
            wan.enable()
        elif act == "-us":
            assert dit_accel.disable(wan.pipe)
        else:
            (on if act == "+other" else off)(wan)
        active = {"+us": True, "-us": False}.get(act, active)
        assert torch.equal(wan(), sparse_of("wan") if active else dense_of("wan"))
    wan.check_restored()


@pytest.mark.combination("Switching", "two pipelines that share a transformer", "works", "one acceleration, both runs")
def test_two_pipelines_share_a_transformer(wan: Any, sparse_of: Any, dense_of: Any, ran_sparse: Any) -> None:
    twin = diffusers.WanPipeline(**wan.pipe.components)
    twin.set_progress_bar_config(disable=True)
    with wan.enabled() as handle:
        assert torch.equal(wan(twin), sparse_of("wan"))
        ran_sparse(handle)
        # Runs that take turns forget each other's plans.
        other = {"prompt_embeds": wan.call["prompt_embeds"] * 2}
        first = wan(twin, **other)
        assert torch.equal(wan(), sparse_of("wan"))
        assert torch.equal(wan(twin, **other), first)
        assert dit_accel.status(twin)["transformer"].sparse_calls > 0
        assert torch.equal(wan(twin), sparse_of("wan"))
        again = wan.enable(twin)  # through the other pipeline it is still one transformer
        assert not handle.active
        assert torch.equal(wan(twin), sparse_of("wan"))
        again.disable()
    assert torch.equal(wan(twin), dense_of("wan"))


def test_a_pipeline_that_counts_for_itself(flux: Any, sparse_of: Any, ran_sparse: Any) -> None:
    """FLUX says no steps, so they come from the scheduler of the pipeline that runs, not of the one that was enabled."""
    scheduler = type(flux.pipe.scheduler).from_config(flux.pipe.scheduler.config)
    twin = diffusers.FluxPipeline(**{**flux.pipe.components, "scheduler": scheduler})
    twin.set_progress_bar_config(disable=True)
    with flux.enabled() as handle:
        for pipe in (twin, None, twin):
            assert torch.equal(flux(pipe), sparse_of("flux"))
            ran_sparse(handle)


@pytest.mark.combination("Switching", "another task on the same transformer (`from_pipe`)", "works")
def test_from_pipe(wan: Any, ran_sparse: Any) -> None:
    video = [torch.rand(3, 128, 128) for _ in range(17)]
    second = diffusers.WanVideoToVideoPipeline.from_pipe(wan.pipe)
    second.set_progress_bar_config(disable=True)

    def run() -> torch.Tensor:
        call = {name: value for name, value in wan.call.items() if name != "num_frames"}
        generator = torch.Generator().manual_seed(0)
        out = second(video=video, strength=0.9, **call, generator=generator, output_type="latent", return_dict=False)
        return out[0]

    dense = run()
    with wan.enabled(density=1.0):
        torch.testing.assert_close(run(), dense, rtol=1e-4, atol=1e-4)
    with wan.enabled() as handle:
        assert not torch.equal(run(), dense)
        ran_sparse(handle, at_least=0.5)
    assert torch.equal(run(), dense)


@pytest.mark.combination("Switching", "two different models in one process", "works", "each has its own run")
def test_two_models(wan: Any, flux: Any, dense_of: Any, sparse_of: Any, ran_sparse: Any) -> None:
    with wan.enabled() as of_wan:
        assert torch.equal(flux(), dense_of("flux"))
        with flux.enabled() as of_flux:
            assert torch.equal(wan(), sparse_of("wan"))
            assert torch.equal(flux(), sparse_of("flux"))
            ran_sparse(of_wan)
            ran_sparse(of_flux)
        assert torch.equal(wan(), sparse_of("wan"))
    assert torch.equal(wan(), dense_of("wan"))


@pytest.mark.combination("Switching", "two models of one class", "works", "one may be accelerated and the other not")
def test_two_models_of_one_class(make: Any, dense_of: Any, sparse_of: Any) -> None:
    first, second = make("cogvideox"), make("cogvideox")
    with first.enabled():
        assert torch.equal(second(), dense_of("cogvideox"))
        assert torch.equal(first(), sparse_of("cogvideox"))
        with second.enabled(density=1.0):
            torch.testing.assert_close(second(), dense_of("cogvideox"), rtol=1e-4, atol=1e-4)
        assert torch.equal(first(), sparse_of("cogvideox"))
    assert torch.equal(first(), dense_of("cogvideox"))


@pytest.mark.combination("Switching", "Wan 2.2: two transformers", "works", "both are accelerated, or either alone")
def test_two_transformers(wan22: Any, dense_of: Any, sparse_of: Any, ran_sparse: Any) -> None:
    dense = dense_of("wan22")
    with wan22.enabled() as handle:
        assert torch.equal(wan22(), sparse_of("wan22"))
        assert set(handle.stats()) == {"transformer", "transformer_2"}
        for component in handle.stats():
            ran_sparse(handle, component, at_least=0.5)
        handle.disable("transformer")
        assert handle.active
        one = wan22()
        assert not torch.equal(one, dense)
        assert not torch.equal(one, sparse_of("wan22"))
    with wan22.enabled(wan22.pipe.transformer_2) as handle:
        # A bare transformer does not know the pipeline's scheduler; this pipeline says its steps itself.
        assert torch.equal(wan22(), one)
    assert torch.equal(wan22(), dense)
