"""The engine on a GPU: equality within the rounding of bf16, no host synchronisation, compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import dit_accel
from dit_accel.presets import get_method
from dit_accel.runtime import ModelRun

pytestmark = pytest.mark.gpu

GEOMETRY = dit_accel.TokenGeometry((5, 24, 20), prefix=37)


def _qkv(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    gen = torch.Generator(device="cuda").manual_seed(seed)
    return [torch.randn(2, GEOMETRY.tokens, 3, 64, device="cuda", generator=gen).to(dtype) for _ in range(3)]


def _dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def _steps(run: ModelRun, qkv: list[Tensor], steps: range, total: int) -> Tensor:
    out = qkv[0]
    for step in steps:
        run.begin_forward(GEOMETRY, dit_accel.StepInfo(step=step, steps=total))
        out = run.attend(*qkv, layer=0, scale=None, key_valid=None, dense=_dense)
    return out


def _run(name: str, **changes: Any) -> ModelRun:
    run = ModelRun(get_method(name).replace(**changes), model="Test", min_tokens=0)
    run.set_layers(("layer",))
    return run


@contextmanager
def _no_sync() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["auto", "adaspa", "na"])
def test_everything_kept_is_within_bf16_rounding(name: str) -> None:
    qkv = _qkv()
    run = _run(name, **({"window": -1} if name == "na" else {"density": 1.0}))
    out = _steps(run, qkv, range(4), 4)
    exact = _dense(*(x.double() for x in qkv))
    error = (out.double() - exact).norm() / exact.norm()
    assert run.status().sparse_calls > 0
    assert error <= 1.5 * (_dense(*qkv).double() - exact).norm() / exact.norm()


@pytest.mark.parametrize("name", ["auto", "adaspa", "na", "gna", "dina"])
def test_no_host_synchronisation(name: str) -> None:
    """Planning, refreshing and sparse steps; layouts and self-tests are made on the first run."""
    qkv = _qkv()
    run = _run(name, density=0.4)
    _steps(run, qkv, range(10), 10)
    run.reset()
    with _no_sync():
        _steps(run, qkv, range(10), 10)
    assert run.status().sparse_calls >= 8


def test_same_inputs_same_bits() -> None:
    qkv = _qkv()
    first = _steps(_run("auto"), qkv, range(5), 5)
    assert torch.equal(_steps(_run("auto"), qkv, range(5), 5), first)


def test_text_stays_exact() -> None:
    qkv = _qkv()
    out, dense = _steps(_run("auto", density=0.2), qkv, range(5), 5), _dense(*qkv)
    torch.testing.assert_close(out[:, :37], dense[:, :37], atol=1e-2, rtol=2e-2)
    assert (out - dense).abs().max() > 0.05


def test_pipeline_on_the_gpu(pipe: Any, generate: Callable[..., Tensor]) -> None:
    pipe.to("cuda", torch.bfloat16)
    dense = generate()
    with dit_accel.enable(pipe, "auto", min_tokens=0, density=1.0):
        full = generate()
    with dit_accel.enable(pipe, "auto", min_tokens=0, density=0.3) as handle:
        generate()
        status = handle.stats()["transformer"]
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
        generate()
    assert status.backend in ("triton", "hopper")
    assert status.sparse_calls == 16
    assert float((full - dense).norm() / dense.norm()) < 2e-2
