"""``Method.hopper_blocks``: larger blocks where the Hopper kernel serves the call, the method's own elsewhere."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from driving import make_run, one_step

from dit_accel import eligibility
from dit_accel.eligibility import Eligibility
from dit_accel.method import Method
from dit_accel.presets import get_method

METHOD = Method(name="tried", score="mean_pool", warmup=0.0, density=0.5, hopper_blocks=(128, 64))
ON_GPU: Any = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, shape=(1, 4096, 2, 64))
ON_CPU: Any = SimpleNamespace(device=torch.device("cpu"), dtype=torch.bfloat16, shape=(1, 4096, 2, 64))


def _serves(monkeypatch: pytest.MonkeyPatch, *sizes: int) -> None:
    def choose(**need: Any) -> tuple[str, dict[str, str]]:
        return ("hopper" if need["block_q"] in sizes else "triton"), {}

    monkeypatch.setattr(eligibility, "choose_backend", choose)


def _sizes(asked: Method, query: Any, backend: str | None = None) -> tuple[int, int]:
    method = Eligibility(asked, backend, 0, None).fitted(asked, query)
    return method.block_q, method.block_k


def test_taken_where_the_hopper_kernel_serves_them(monkeypatch: pytest.MonkeyPatch) -> None:
    _serves(monkeypatch, 128)
    assert _sizes(METHOD, ON_GPU) == (128, 64)
    assert _sizes(METHOD, ON_GPU, backend="hopper") == (128, 64)


def test_not_taken_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    _serves(monkeypatch)
    assert _sizes(METHOD, ON_GPU) == (64, 64)
    _serves(monkeypatch, 128)
    assert _sizes(METHOD, ON_CPU) == (64, 64)
    assert _sizes(METHOD, ON_GPU, backend="triton") == (64, 64)
    assert _sizes(METHOD.replace(hopper_blocks=None), ON_GPU) == (64, 64)


def test_a_size_that_was_named_holds_everywhere() -> None:
    assert get_method("auto").hopper_blocks == (128, 64)
    assert get_method("auto").replace(block_q=32).hopper_blocks is None
    assert get_method("auto").replace(density=0.5).hopper_blocks == (128, 64)
    assert Method.from_json(METHOD.to_json()) == METHOD


@pytest.mark.parametrize("pair", [(128, 48), (128,), 128, (64, 64, 64)])
def test_bad_sizes(pair: Any) -> None:
    with pytest.raises(ValueError, match="hopper_blocks must be None or two of 16, 32, 64, 128"):
        METHOD.replace(hopper_blocks=pair)


def test_a_run_follows_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run computes with fitted sizes is what it computes with those sizes named; plans of others are dropped."""
    run, named, small = make_run(METHOD, 1), make_run(METHOD, 1, block_q=128), make_run(METHOD, 1)
    before = one_step(run, 0, 4)["cond", 0]
    torch.testing.assert_close(before, one_step(small, 0, 4)["cond", 0], rtol=0, atol=0)
    fitted = METHOD.replace(block_q=128, block_k=64)
    monkeypatch.setattr(run._eligible, "fitted", lambda asked, query: fitted)
    after = one_step(run, 1, 4)["cond", 0]
    torch.testing.assert_close(after, one_step(named, 1, 4)["cond", 0], rtol=0, atol=0)
    assert not torch.equal(after, before)
    assert run.status().plans == 2
