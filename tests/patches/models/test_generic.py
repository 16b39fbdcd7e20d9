"""Transformers without an adapter of their own: one axis, or the reason why not."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from model_zoo.rest import DENSE
from torch import Tensor, nn

import dit_accel
from dit_accel.method import Method
from dit_accel.registry import find_adapter
from dit_accel_patches.calls import RULES, make_rule
from dit_accel_patches.models.generic import ADAPTER as GENERIC

FLAT = Method(name="test", score="mean_pool", density=0.5, block_q=16, block_k=16, warmup=0.0)


class Processor:
    """Self-attention where nothing else is given, and cross-attention where it is."""

    def __call__(self, attn: Any, hidden: Tensor, other: Tensor | None = None) -> Tensor:
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        source = hidden if other is None else other
        q, k, v = (x.unflatten(2, (2, -1)) for x in (hidden, source, source))
        return attn.out(dispatch_attention_fn(q, k, v, backend=self._attention_backend).flatten(2))

    _attention_backend = None


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(32, 32)
        self.processor = Processor()

    def forward(self, *args: Any) -> Tensor:
        return self.processor(self, *args)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mine, self.cross = Layer(), Layer()

    def forward(self, hidden: Tensor, text: Tensor) -> Tensor:
        hidden = hidden + self.mine(hidden)
        return hidden + self.cross(hidden, text)


class NewModel(diffusers.ModelMixin):
    """A class that no adapter has heard of."""

    def __init__(self) -> None:
        super().__init__()
        self.refiner = nn.ModuleList([Layer()])
        self.parts = nn.ModuleList([Block(), Block()])

    def forward(self, hidden: Tensor, text: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        for layer in self.refiner:
            text = layer(text)
        for part in self.parts:
            hidden = part(hidden, text)
        return (hidden,)


def call(tokens: int = 160, timestep: float = 900.0) -> dict[str, Any]:
    gen = torch.Generator().manual_seed(tokens)
    shapes = ((2, tokens, 32), (2, 12, 32))
    hidden, text = (torch.randn(*shape, generator=gen) for shape in shapes)
    return {"hidden": hidden, "text": text, "timestep": torch.tensor([timestep])}


def test_an_unknown_class_is_sparse_on_one_axis(forward: Any) -> None:
    model = NewModel().eval()
    assert find_adapter(model) is GENERIC
    expected = forward(model, call())[0]
    with dit_accel.enable(model, FLAT, min_tokens=0) as handle:
        forward(model, call())
        forward(model, call(timestep=500.0))
        status = handle.stats()["transformer"]
    assert status.geometry == "160 flat"
    assert [layer.sparse for layer in status.layers] == [1, 2, 0, 2, 0]  # the refiner comes before the length is known
    assert status.cache_hits == 2
    with dit_accel.enable(model, FLAT.replace(density=1.0), min_tokens=0):
        torch.testing.assert_close(forward(model, call())[0], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(forward(model, call())[0], expected)


def test_cross_attention_is_told_apart_by_its_shape(forward: Any) -> None:
    model = NewModel().eval()
    with dit_accel.enable(model, FLAT, min_tokens=64) as handle:
        forward(model, call())
        reasons = handle.stats()["transformer"].reasons
    assert reasons["not self-attention: query (2, 160, 2, 16), key (2, 12, 2, 16)"] == 2
    with dit_accel.enable(model, FLAT, min_tokens=0) as handle:
        longer = {**call(8), "text": torch.randn(2, 40, 32)}
        forward(model, longer)
        reasons = handle.stats()["transformer"].reasons
    assert reasons["not self-attention: 8 queries on 40 keys"] == 2


def test_the_length_of_another_run_is_forgotten(forward: Any) -> None:
    model = NewModel().eval()
    with dit_accel.enable(model, FLAT, min_tokens=0) as handle:
        forward(model, call(160, 500.0))
        forward(model, call(96, 900.0))
        status = handle.stats()["transformer"]
    assert status.geometry == "96 flat"
    assert sum(layer.sparse for layer in status.layers) == 3


def test_a_method_that_needs_a_grid_says_so(forward: Any) -> None:
    model = NewModel().eval()
    with dit_accel.enable(model, FLAT.replace(order="gilbert"), min_tokens=0) as handle:
        forward(model, call())
        status = handle.stats()["transformer"]
    assert status.sparse_calls == 0
    assert "method 'test' needs a grid, the geometry is 160 flat" in status.reasons


@pytest.mark.parametrize("name", DENSE)
def test_attention_of_another_kind_stays_dense_with_a_reason(name: str, forward: Any) -> None:
    torch.manual_seed(0)
    if name == "ideogram4" and not hasattr(diffusers, "Ideogram4Transformer2DModel"):
        pytest.skip("this version of diffusers has no Ideogram 4")
    model, arguments = DENSE[name]()
    expected = forward(model.eval(), arguments)[0]
    with dit_accel.enable(model, FLAT, min_tokens=0) as handle:
        assert torch.equal(forward(model, arguments)[0], expected)
        status = handle.stats()["transformer"]
    assert status.sparse_calls == 0
    assert status.calls > 0
    assert "attention mask of shape" in "; ".join(status.reasons)


@pytest.mark.parametrize("name", GENERIC.refused)
def test_a_class_that_cannot_be_accelerated_says_why(name: str) -> None:
    if hasattr(diffusers, "Flux3Transformer2DModel"):  # as of diffusers 0.42 there are all of them
        assert hasattr(diffusers, name)
    model = type(name, (diffusers.ModelMixin,), {})()
    with pytest.raises(ValueError, match=f"{name} cannot be accelerated: .*"):
        dit_accel.enable(model, FLAT)


def test_rules_by_name() -> None:
    assert make_rule("") is None
    assert {type(make_rule(name)) for name in RULES} == set(RULES.values())
    with pytest.raises(ValueError, match="calls must be one of keys_in_front, .*, got 'no'"):
        make_rule("no")
