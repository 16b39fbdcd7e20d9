"""Every class in the zoo: equal to dense where everything is kept, sparse where not, itself again after ``disable``."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from model_zoo import MAKERS

import dit_accel
from dit_accel.method import Method
from dit_accel.registry import find_adapter

#: Blocks of 16, no warm-up: the first forward call is sparse.
METHOD = Method(
    name="test", order="gilbert", score="mean_pool", select="top_k", density=0.5, block_q=16, block_k=16, warmup=0.0
)
GENERIC = ("bria_fibo2",)
#: Layers that call attention twice, once of another kind: the reason that is counted for it.
OTHER_CALLS = {"bria_fibo2": {"not self-attention"}, "cosmos3": {"causal attention"}}


def method(name: str, **changes: Any) -> Method:
    return METHOD.replace(**{**({"order": "raster"} if name in GENERIC else {}), **changes})


@pytest.mark.parametrize("name", MAKERS)
def test_model(name: str, make: Any, forward: Any) -> None:
    model, arguments = make(name)
    processors = {path: module.processor for path, module in model.named_modules() if hasattr(module, "processor")}
    expected = forward(model, arguments)
    assert all(torch.isfinite(found).all() for found in expected)

    with dit_accel.enable(model, method(name, density=1.0), min_tokens=0) as handle:
        same = forward(model, arguments)
        status = handle.stats()["transformer"]
    assert {reason.split(":")[0] for reason in status.reasons} == OTHER_CALLS.get(name, set())
    wanted_calls = status.calls - sum(status.reasons.values())
    assert status.sparse_calls == wanted_calls > 0
    for found, wanted in zip(same, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=2e-4)

    with dit_accel.enable(model, method(name), min_tokens=0) as handle:
        sparse = forward(model, arguments)
        status = handle.stats()["transformer"]
    assert status.sparse_density < 0.9
    assert status.sparse_calls == wanted_calls
    assert all(torch.isfinite(found).all() for found in sparse)
    assert not torch.allclose(sparse[0], expected[0], rtol=1e-4, atol=1e-5)

    for found, wanted in zip(forward(model, arguments), expected, strict=True):
        assert torch.equal(found, wanted)
    for path, module in model.named_modules():
        if hasattr(module, "processor"):
            assert module.processor is processors[path]


@pytest.mark.skipif(not hasattr(diffusers, "Flux3Transformer2DModel"), reason="needs diffusers 0.42")
def test_there_are_more_than_forty_classes(make: Any) -> None:
    classes = {type(make(name)[0]).__name__ for name in MAKERS}
    assert len(classes) >= 40
    listed = {row["model"] for row in dit_accel.supported_models()}
    assert listed - classes == {"ModelMixin"}


@pytest.mark.parametrize("name", MAKERS)
def test_the_adapter_knows_the_grid(name: str, make: Any) -> None:
    model, arguments = make(name)
    adapter = find_adapter(model)
    assert adapter is not None
    geometry = adapter.geometry(model, (), arguments)
    if name in GENERIC:
        assert adapter.name == "generic"
    else:
        assert isinstance(geometry, dit_accel.TokenGeometry)
        assert geometry.grid is not None
