from __future__ import annotations

import logging

import pytest
import torch
from diffusers.models import attention_dispatch

from dit_accel_patches.install import install
from dit_accel_patches.wan import ADAPTER as WAN


@pytest.fixture(autouse=True)
def _active_backend():
    """diffusers' set_attention_backend changes the default of the process; no test may leave that behind."""
    registry = attention_dispatch._AttentionBackendRegistry
    active = registry._active_backend
    yield
    registry._active_backend = active


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.name.startswith("dit_accel")]


def test_set_attention_backend_is_taken_for_the_dense_calls(wan, make_run, caplog, processors):
    before = processors(wan.model)
    run = make_run()
    installation = install(wan.model, WAN, run)
    wan.model.set_attention_backend("_native_math")
    with caplog.at_level(logging.WARNING, logger="dit_accel"):
        out = wan()
        wan()
    assert len(run.layers) == 16
    assert warnings_of(caplog) == [
        "the attention backend was set to _native_math; it computes the dense calls, dit_accel stays on (2 of 2 layers)"
    ]
    installation.undo()
    after = processors(wan.model)
    assert all(after[name] is before[name] for name in before)
    # What the user set stays set.
    assert {p._attention_backend.value for p in after.values()} == {"_native_math"}
    assert torch.equal(wan(), out)


def test_a_backend_set_before_computes_the_dense_calls(wan, make_run, monkeypatch):
    registry, names = attention_dispatch._AttentionBackendRegistry, attention_dispatch.AttentionBackendName
    used = []
    original = registry._backends[names._NATIVE_MATH]

    def spy(**kwargs):
        used.append(kwargs["query"].shape)
        return original(**kwargs)

    wan.model.set_attention_backend("_native_math")
    registry._active_backend = names.NATIVE
    monkeypatch.setitem(registry._backends, names._NATIVE_MATH, spy)
    install(wan.model, WAN, make_run())
    wan(num_inference_steps=1)
    # Two forwards of two layers, self-attention through us and cross-attention without us.
    assert len(used) == 8


def test_reset_attention_backend_is_repaired(wan, make_run):
    run = make_run()
    install(wan.model, WAN, run)
    wan.model.reset_attention_backend()
    wan()
    assert len(run.layers) == 8


def test_choosing_us_by_name_is_harmless_without_an_installation(wan, make_run):
    expected = wan()
    install(wan.model, WAN, make_run()).undo()
    wan.model.set_attention_backend("dit_accel")
    assert torch.equal(wan(), expected)
    run = make_run()
    install(wan.model, WAN, run)
    assert torch.equal(wan(), expected)
    assert run.calls


def test_attention_backend_context_manager_reaches_the_dense_calls(wan, make_run):
    from diffusers.models.attention_dispatch import attention_backend

    with attention_backend("_native_math"):
        expected = wan()
    install(wan.model, WAN, make_run())
    with attention_backend("_native_math"):
        assert torch.equal(wan(), expected)
