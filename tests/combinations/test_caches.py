"""Caching between steps: diffusers' own hooks, and cache-dit. They skip layers or steps; what runs stays sparse.

The plans of a layer belong to steps, not to calls: a layer that was skipped goes on with the plan of its step.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import diffusers.hooks as hooks
import pytest
import torch

import dit_accel

STEPS = 8


def _first_block(tiny: Any) -> Any:
    return hooks.FirstBlockCacheConfig(threshold=0.3)


def _pab(tiny: Any) -> Any:
    return hooks.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        spatial_attention_block_identifiers=("blocks",),
        current_timestep_callback=lambda: 500,
    )


def _faster(tiny: Any) -> Any:
    return hooks.FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 700),
        unconditional_batch_skip_range=2,
        unconditional_batch_timestep_skip_range=(-1, 600),
        attention_weight_callback=lambda module: 0.5,
        current_timestep_callback=lambda: tiny.pipe._current_timestep,
        tensor_format="BFCHW",
    )


def _mag(tiny: Any) -> Any:
    return hooks.MagCacheConfig(
        num_inference_steps=STEPS, mag_ratios=[1.0] * 2 * STEPS, threshold=0.5, max_skip_steps=1
    )


def _taylor(tiny: Any) -> Any:
    # Its own patterns know no module of Wan.
    return hooks.TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=3, cache_identifiers=[r"blocks\.\d+\.attn1"]
    )


def _check(tiny: Any, make: Callable[[Any], Any], first: str) -> None:
    """With the cache and without us, with both, with both and everything kept, and back."""

    def run() -> torch.Tensor:
        return tiny(num_inference_steps=STEPS)

    dense, everything = run(), _calls_without_a_cache(tiny)
    tiny.model.enable_cache(make(tiny))
    cached = run()
    assert not torch.equal(cached, dense), "the cache had no effect"
    if first == "cache":
        handle = tiny.enable()
    else:
        tiny.model.disable_cache()
        handle = tiny.enable()
        tiny.model.enable_cache(make(tiny))
    outs = [run() for _ in range(2)]
    status = handle.stats()["transformer"]
    assert torch.equal(*outs)
    assert torch.isfinite(outs[0]).all()
    assert status.calls < everything, "the cache skipped nothing"
    assert status.sparse_calls >= 0.5 * status.calls
    assert status.sparse_density < 0.5
    assert not torch.equal(outs[0], cached)
    tiny.enable(density=1.0)  # everything kept: the cache alone is left
    torch.testing.assert_close(run(), cached, rtol=1e-3, atol=1e-3)
    dit_accel.disable(tiny.pipe)
    assert torch.equal(run(), cached)
    tiny.model.disable_cache()
    assert torch.equal(run(), dense)
    tiny.check_restored()


def _calls_without_a_cache(tiny: Any) -> int:
    with tiny.enabled() as handle:
        tiny(num_inference_steps=STEPS)
        return handle.stats()["transformer"].calls


def _known(name: str) -> Any:
    return pytest.mark.skipif(not hasattr(hooks, name), reason=f"this diffusers has no {name}")


FIRST = pytest.mark.parametrize("first", ["cache", "us"])


@FIRST
@pytest.mark.combination("Caches", "First Block Cache", "works", "in any order of switching on and off")
def test_first_block_cache(wan: Any, first: str) -> None:
    _check(wan, _first_block, first)


@FIRST
@pytest.mark.combination("Caches", "Pyramid Attention Broadcast", "works")
def test_pyramid_attention_broadcast(wan: Any, first: str) -> None:
    _check(wan, _pab, first)


@FIRST
@pytest.mark.combination("Caches", "FasterCache", "works")
def test_faster_cache(cogvideox: Any, first: str) -> None:
    """Steps without the unconditional half of the batch have plans of their own."""
    _check(cogvideox, _faster, first)


@_known("MagCacheConfig")
@FIRST
@pytest.mark.combination("Caches", "MagCache", "works")
def test_mag_cache(wan: Any, first: str) -> None:
    _check(wan, _mag, first)


@_known("TaylorSeerCacheConfig")
@FIRST
@pytest.mark.combination("Caches", "TaylorSeer", "works")
def test_taylor_seer(wan: Any, first: str) -> None:
    _check(wan, _taylor, first)


def _skip(tiny: Any, what: str) -> list[int]:
    """Skip a part of the second block; the attention calls of each layer that are left."""
    from diffusers.hooks import LayerSkipConfig, apply_layer_skip

    config = LayerSkipConfig(
        indices=[1],
        fqn="transformer_blocks",
        skip_attention=what in ("block", "attention"),
        skip_attention_scores=what == "attention scores",
        skip_ff=what in ("block", "feed-forward"),
    )
    handle = tiny.enable()
    plain = tiny()
    apply_layer_skip(tiny.model, config)
    skipped = tiny()
    status = handle.stats()["transformer"]
    assert not torch.equal(skipped, plain)
    assert status.sparse_density < 0.5
    handle.disable()
    dense = tiny()
    assert not torch.equal(dense, skipped)
    with tiny.enabled(density=1.0):
        torch.testing.assert_close(tiny(), dense, rtol=1e-3, atol=1e-3)
    return [layer.sparse for layer in status.layers]


@pytest.mark.combination("Caches", "layer skip (`LayerSkipConfig`): blocks, attention, feed-forward", "works")
@pytest.mark.parametrize(
    ("family", "what", "sparse"),
    [
        ("cogvideox", "block", [3, 0]),
        ("cogvideox", "feed-forward", [3, 3]),
        ("dit", "attention", [3, 0]),
        ("dit", "feed-forward", [3, 3]),
    ],
)
def test_layer_skip(make: Any, family: str, what: str, sparse: list[int]) -> None:
    assert _skip(make(family), what) == sparse


@pytest.mark.combination("Caches", "layer skip of attention scores (perturbed attention)", "stays dense", "that layer")
def test_skipped_scores(dit: Any) -> None:
    assert _skip(dit, "attention scores") == [3, 0]


def test_skipped_scores_behind_a_backend(wan: Any) -> None:
    from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode

    with AttentionScoreSkipFunctionMode():
        expected = wan()
        with wan.enabled() as handle:
            assert torch.equal(wan(), expected)
            (reason,) = handle.stats()["transformer"].reasons
    assert "AttentionScoreSkipFunctionMode" in reason
    assert not torch.equal(wan(), expected)


@pytest.fixture
def cache_dit() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("cache_dit", exc_type=ImportError)


@pytest.mark.combination(
    "Caches", "cache-dit (`cache_dit.enable_cache`)", "works", "in either order; disable in either order"
)
@pytest.mark.parametrize("first", ["cache", "us"])
@pytest.mark.parametrize("off", ["cache", "us"])
def test_cache_dit(wan: Any, cache_dit: Any, first: str, off: str) -> None:
    call = type(wan.pipe).__call__
    dense = wan(num_inference_steps=STEPS)

    def cache() -> None:
        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=0.9, max_warmup_steps=2
        )
        cache_dit.enable_cache(wan.pipe, cache_config=config)

    try:
        cache()
        cached = wan(num_inference_steps=STEPS)
        assert not torch.equal(cached, dense), "the cache had no effect"
        if first == "us":
            cache_dit.disable_cache(wan.pipe)
        handle = wan.enable()
        if first == "us":
            cache()
        outs = [wan(num_inference_steps=STEPS) for _ in range(2)]
        status = handle.stats()["transformer"]
        assert torch.equal(*outs)
        assert status.calls < STEPS * 2 * 2, "the cache skipped nothing"
        assert status.sparse_calls >= 0.5 * status.calls
        assert status.sparse_density < 0.5
        wan.enable(density=1.0)
        torch.testing.assert_close(wan(num_inference_steps=STEPS), cached, rtol=1e-3, atol=1e-3)
        if off == "us":
            dit_accel.disable(wan.pipe)
            assert torch.equal(wan(num_inference_steps=STEPS), cached)
            cache_dit.disable_cache(wan.pipe)
        else:
            cache_dit.disable_cache(wan.pipe)
            torch.testing.assert_close(wan(num_inference_steps=STEPS), dense, rtol=1e-3, atol=1e-3)
            dit_accel.disable(wan.pipe)
        assert torch.equal(wan(num_inference_steps=STEPS), dense)
    finally:
        type(wan.pipe).__call__ = call  # cache-dit exchanges it for the class
    wan.check_restored()
