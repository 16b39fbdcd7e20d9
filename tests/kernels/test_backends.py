from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_accel_kernels import backends
from dit_accel_kernels.backends import (
    BACKENDS,
    Backend,
    choose_backend,
    register_backend,
    require_backend,
    run_backend,
    self_test,
    why_not,
)
from dit_accel_kernels.lists import gathered_from_mask, lists_from_levels
from dit_accel_kernels.types import GatheredKeys

SITE: dict[str, Any] = {"dtype": torch.float32, "head_dim": 64, "block_q": 64, "block_k": 64}


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    known = dict(BACKENDS)
    monkeypatch.setattr(backends, "_choices", {})
    monkeypatch.setattr(backends, "_self_tests", {})
    yield
    BACKENDS.clear()
    BACKENDS.update(known)


def dense(q: Tensor, k: Tensor, v: Tensor, lists: Any, *, scale: float, **_: Any) -> tuple[Tensor, Tensor]:
    """What a backend that ignores the mask computes."""
    logits = q @ k.mT * scale
    return logits.softmax(-1) @ v, logits.logsumexp(-1)


def test_order_of_preference() -> None:
    ours = ["hopper", "triton", "cpu"]
    assert list(BACKENDS) == [*ours, "flex", "flash4", "natten", "xformers", "reference"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("block_q", "block_k", "head_dim"), [(64, 64, 64), (128, 64, 72), (128, 128, 128)])
def test_cpu_passes_and_is_chosen(dtype: torch.dtype, block_q: int, block_k: int, head_dim: int) -> None:
    site = {"dtype": dtype, "head_dim": head_dim, "block_q": block_q, "block_k": block_k}
    name, reasons = choose_backend(device="cpu", **site)
    assert name == "cpu"
    assert "triton" in reasons


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 72, 80, 96, 112, 128, 256])
@pytest.mark.parametrize(("block_q", "block_k"), [(64, 64), (128, 64), (64, 128), (128, 128)])
def test_triton_passes_and_is_chosen(dtype: torch.dtype, head_dim: int, block_q: int, block_k: int) -> None:
    site = {"dtype": dtype, "head_dim": head_dim, "block_q": block_q, "block_k": block_k}
    name, reasons = choose_backend(device="cuda", **site)
    if why_not("hopper", device="cuda", **site) is None:
        assert (name, reasons) == ("hopper", {})
        assert self_test("triton", "cuda", dtype, head_dim, block_q, block_k) is None
    else:
        assert name == "triton"
        assert set(reasons) == {"hopper"}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("flash", {}, "backend must be one of .*, got 'flash'"),
        ("triton", {"device": "meta"}, "device must be cuda .*, got meta"),
        ("cpu", {"device": "meta"}, "device must be cpu, got meta"),
        ("cpu", {"dtype": torch.int8}, "dtype must be one of .*, got torch.int8"),
    ],
)
def test_reasons_name_value_and_expectation(name: str, change: dict[str, Any], message: str) -> None:
    site = {"device": torch.device("cpu"), **SITE, **change}
    site["device"] = torch.device(site["device"])
    with pytest.raises(ValueError, match=message):
        require_backend(name, **site)


@pytest.mark.interpreter
def test_interpreter_counts_as_triton_but_is_not_chosen() -> None:
    from tests.kernels.interpreter import repair

    repair()
    assert why_not("triton", device="cpu", **SITE) is None
    assert self_test("triton", "cpu", **SITE) is None
    assert choose_backend(device="cpu", **SITE)[0] == "cpu"
    assert "head_dim must be at most 256, got 300" in str(why_not("triton", device="cpu", **{**SITE, "head_dim": 300}))
    assert "block_k must be one of" in str(why_not("triton", device="cpu", **{**SITE, "block_k": 48}))


def test_a_backend_that_ignores_the_mask_fails_and_is_passed_over() -> None:
    register_backend(Backend("dense", lambda **_: None, dense, ("cpu",)), first=True)
    assert "output differs from the reference" in str(self_test("dense", "cpu", **SITE))
    name, reasons = choose_backend(device="cpu", **SITE)
    assert name == "cpu"
    assert "output differs" in reasons["dense"]
    with pytest.raises(RuntimeError, match="failed its self-test"):
        require_backend("dense", device=torch.device("cpu"), **SITE)


def test_a_backend_that_ignores_the_remainder_fails() -> None:
    def run(*args: Any, pooled: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return run_backend("cpu", *args, pooled=None, **kwargs)

    register_backend(Backend("half", lambda **_: None, run, ("cpu",)))
    assert "with a pooled remainder" in str(self_test("half", "cpu", **SITE))


def test_a_backend_that_ignores_gathered_keys_fails() -> None:
    def run(*args: Any, gathered: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return run_backend("cpu", *args, **kwargs)

    register_backend(Backend("blocks", lambda **_: None, run, ("cpu",)))
    assert "with gathered keys" in str(self_test("blocks", "cpu", **SITE))


def test_a_call_that_hopper_does_not_serve_goes_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from dit_accel_kernels.block_sparse import launch

    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(launch, "block_sparse_triton", lambda *_, **given: calls.append(given))
    q = torch.zeros(1, 1, 128, 8)
    lists = lists_from_levels(torch.ones(1, 1, 1, 1, dtype=torch.uint8), 128, 128)
    rows = gathered_from_mask(torch.ones(1, 1, 1, 32, dtype=torch.bool))
    more = GatheredKeys(q, q, torch.zeros(1, 1, 128), *rows, 4)
    run_backend("hopper", q, q, q, lists, gathered=more, scale=1.0)
    assert calls[0]["gathered"] is more
    assert calls[0]["scale"] == 1.0


def test_a_backend_that_raises_gives_its_reason() -> None:
    def run(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise OSError("no compiler")

    register_backend(Backend("broken", lambda **_: None, run, ("cpu",)))
    assert self_test("broken", "cpu", **SITE) == "self-test raised OSError: no compiler"


def test_only_the_reference_left_warns() -> None:
    BACKENDS["cpu"] = replace(BACKENDS["cpu"], why_not=lambda **_: "switched off")
    with pytest.warns(UserWarning, match=r"slow reference .*cpu: switched off"):
        assert choose_backend(device="cpu", **SITE)[0] == "reference"
    assert choose_backend(device="cpu", **SITE)[0] == "reference"  # once


def test_self_tests_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert self_test("cpu", "cpu", **SITE) is None
    monkeypatch.setattr(backends, "_compare", lambda *_: "ran again")
    assert self_test("cpu", "cpu", **SITE) is None
