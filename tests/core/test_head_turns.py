"""Sparse calls a few heads at a time give the output of one call; on the CPU they have the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dit_accel.head_turns as head_turns
from dit_accel import StepInfo, TokenGeometry
from dit_accel.asked import choose
from dit_accel.runtime import ModelRun

GEOMETRY = TokenGeometry((4, 8, 8), suffix=20)
METHODS: dict[str, dict[str, Any]] = {
    "auto": {"method": "auto"},
    "drop": {"score": "spread", "select": "top_k", "order": "axes", "order_choice": "spread"},
    "mean": {"score": "mass", "select": "top_k", "order": "axes", "order_choice": "spread", "compensate": "mean"},
    "8 bits": {"method": "auto", "precision": "int8"},
    "one mask": {"score": "proxy", "select": "top_k", "order": "brick", "compensate": "mean"},
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("masked", [False, True])
def test_turns_have_the_same_bits(monkeypatch: pytest.MonkeyPatch, name: str, masked: bool) -> None:
    options = {"density": 0.3, "warmup": 0.0, "block_q": 32, "block_k": 32, **METHODS[name]}
    method = choose(options.pop("method", None), options)
    gen = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, GEOMETRY.tokens, 5, 32, generator=gen) for _ in range(3)]
    valid = torch.ones(2, GEOMETRY.tokens, dtype=torch.bool)
    valid[:, -7:] = False
    outs: list[torch.Tensor] = []
    used: list[int] = []
    real = head_turns.in_turns

    def watched(*args: Any, **kwargs: Any) -> Any:
        used.append(kwargs["turns"])
        return real(*args, **kwargs)

    monkeypatch.setattr("dit_accel.plan.in_turns", watched)
    for limit in (head_turns._AT_ONCE, 100_000):
        monkeypatch.setattr(head_turns, "_AT_ONCE", limit)
        run = ModelRun(method, ("layer",), min_tokens=0)
        run.set_layers(("layer",))
        for step in range(2):
            run.begin_forward(GEOMETRY, StepInfo(step=step + 1, steps=50))
            out = run.attend(
                *tensors,
                layer=0,
                scale=None,
                key_valid=valid if masked else None,
                dense=lambda *_: pytest.fail("dense"),
            )
        outs.append(out)
    assert torch.equal(*outs)
    # A mask of keys makes heads with orders of their own batch elements, which are not divided.
    assert set(used) == (set() if masked and name != "one mask" else {5})
