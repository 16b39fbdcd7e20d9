"""A run with a precision: what ``"auto"`` measures and keeps, what is counted, and what a device cannot do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from driving import VIDEO, Tensors, layer_tensors, make_run, one_step
from problems import qkv
from torch import Tensor

import dit_accel
from dit_accel import eligibility
from dit_accel.precision import serving
from dit_accel.precision.by_head import HeadPrecisions, head_errors
from dit_accel.presets import get_method
from dit_accel.runtime import ModelRun
from dit_accel_kernels.quantize import PRECISIONS, Precision

TINY_WAN = Path(__file__).resolve().parents[2] / "examples/tiny_wan"


def _hard(layer: int, step: int = 0, branch: str = "cond") -> Tensors:
    """Head 2 of layer 1 has a token in every block whose keys set the scale of all others."""
    q, k, v = (
        x.transpose(1, 2).clone() for x in qkv(VIDEO, seed=17 * layer + (5 if branch == "uncond" else 0), heads=4)
    )
    if layer == 1:
        k[:, ::8, 2, 20] = 4000.0  # a channel that no query looks at
        k[:, 1::8, 2, 20] = -4000.0
        q[:, :, 2, 20] = 0
    return q, k, v


def _steps(run: ModelRun, steps: int, tensors: Any = layer_tensors, **options: Any) -> list[dict[Any, Tensor]]:
    return [one_step(run, step, steps, tensors=tensors, **options) for step in range(steps)]


# -- formats that were named ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["union", "radial", "svg2"])
def test_a_named_format_is_near_and_costs_the_same(method: str) -> None:
    options = {"warmup": 0.0, **({} if method == "svg2" else {"density": 0.4})}
    wide, narrow = (make_run(method, 2, **options, precision=p) for p in ("bf16", "int8"))
    want, got = (_steps(run, 3)[-1]["cond", 0] for run in (wide, narrow))
    error = float((got - want).norm() / want.norm())
    assert 1e-5 < error < 0.02
    before, after = wide.status(), narrow.status()
    assert after.density == before.density
    assert after.sparse_density == before.sparse_density
    assert [layer.precision for layer in after.layers] == ["int8", "int8"]
    assert [layer.precision for layer in before.layers] == ["bf16", "bf16"]
    assert "precision int8" in str(after)
    assert "precision" not in str(before)


def test_dense_attention_in_8_bits() -> None:
    run = make_run("dense", 1, precision="int8")
    out = one_step(run, 0, 2)["cond", 0]
    q, k, v = (x.transpose(1, 2) for x in layer_tensors(0))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    assert 1e-5 < float((out - want).norm() / want.norm()) < 0.02
    status = run.status()
    assert status.sparse_calls == 1
    assert status.sparse_density == 1.0


def _only(names: set[str]) -> Any:
    """A device that has kernels for some value formats alone."""

    def found(precision: Precision, backend: str | None, **where: Any) -> tuple[str, str | None]:
        return ("reference", None) if precision.pv in names else ("reference", f"triton: no {precision.pv} here")

    return found


def test_a_named_format_that_the_device_lacks_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eligibility, "serving", _only({"bf16"}))
    run = make_run("union", 1, precision="int8_fp8")
    with pytest.raises(ValueError, match=r"precision='int8_fp8' cannot be used here.*triton: no fp8 here"):
        one_step(run, 0, 4)


def test_the_reason_is_that_of_the_dispatcher() -> None:
    where = {"device": "cpu", "dtype": torch.float32, "head_dim": 32, "block_q": 64, "block_k": 64}
    assert serving(PRECISIONS["int8"], "reference", **where) == ("reference", None)
    assert serving(PRECISIONS["int8_fp8"], "cpu", **where) == ("reference", None)
    name, reason = serving(PRECISIONS["int8"], "triton", **where)
    assert name == "triton"
    assert reason is not None
    assert reason.startswith("triton: ")


# -- auto -----------------------------------------------------------------------------------------------------------------


def test_auto_keeps_the_head_that_is_hard() -> None:
    options = {"warmup": 0.25, "density": 0.5}
    auto, wide, narrow = (make_run("union", 2, **options, precision=p) for p in ("auto:int8", "bf16", "int8"))
    a, w, n = (_steps(run, 4, _hard)[-1] for run in (auto, wide, narrow))
    key = ("cond", 1)
    assert head_errors(n[key].transpose(1, 2), w[key].transpose(1, 2))[2] > 0.05, "the problem must be hard"
    torch.testing.assert_close(a[key][:, :, 2], w[key][:, :, 2], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(a[key][:, :, [0, 1, 3]], n[key][:, :, [0, 1, 3]], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(a["cond", 0], n["cond", 0], atol=1e-6, rtol=1e-5)
    status = auto.status()
    assert [(layer.precision, layer.wide_heads) for layer in status.layers] == [("int8", []), ("int8", [2])]
    assert "precision int8, 1 heads in 16 bit" in str(status)


def test_each_layer_and_branch_is_measured_once_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[Any] = []
    original = HeadPrecisions._measure
    monkeypatch.setattr(
        HeadPrecisions, "_measure", lambda self, *args, **kw: measured.append(1) or original(self, *args, **kw)
    )
    run = make_run("union", 2, warmup=0.25, density=0.5, refresh=(0.6,), precision="auto")
    for _ in range(2):
        _steps(run, 4, branches=("cond", "uncond"))
        assert len(measured) == 4, "a refreshed plan keeps the choice"
        measured.clear()
        run.reset()
    one_step(run, 0, 4, branches=("cond",))
    assert not measured


def test_measuring_is_counted_as_work() -> None:
    auto, wide = (make_run("adaspa", 1, warmup=0.0, density=0.4, refresh=(), precision=p) for p in ("auto", "bf16"))
    for run in (auto, wide):
        _steps(run, 3)
    call = wide.status().sparse_density
    assert auto.status().density - wide.status().density == pytest.approx(2 * call / 3, rel=1e-4)
    assert auto.status().plans == wide.status().plans


def test_geometric_plans_are_measured_by_layer() -> None:
    """Layers share the plan of a pattern, not the choice."""
    run = make_run("radial", 2, warmup=0.0, precision="auto:int8")
    _steps(run, 2, _hard)
    assert [layer.wide_heads for layer in run.status().layers] == [[], [2]]


def test_what_8_bits_do_not_have_stays_16_bit_under_auto() -> None:
    for method in ("na", "psa"):
        auto, wide = (make_run(method, 1, warmup=0.0, precision=p) for p in ("auto", "bf16"))
        assert torch.equal(_steps(auto, 2)[-1]["cond", 0], _steps(wide, 2)[-1]["cond", 0])
        assert auto.status().layers[0].precision == "bf16"
        assert auto.status().density == wide.status().density


def test_auto_takes_what_the_device_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eligibility, "serving", _only({"bf16"}))
    run = make_run("union", 1, warmup=0.0, precision="auto")
    _steps(run, 2)
    assert run.status().layers[0].precision == "int8"
    monkeypatch.setattr(eligibility, "serving", _only(set()))
    bare = make_run("union", 1, warmup=0.0, precision="auto")
    wide = make_run("union", 1, warmup=0.0)
    assert torch.equal(_steps(bare, 2)[-1]["cond", 0], _steps(wide, 2)[-1]["cond", 0])
    (note,) = bare.status().notes
    assert note == ("precision='auto' is 16 bit here (int8_fp8: triton: no fp8 here; int8: triton: no bf16 here)")


def test_values_that_are_not_finite_stay_16_bit() -> None:
    def broken(layer: int, step: int = 0, branch: str = "cond") -> Tensors:
        q, k, v = _hard(0)
        v[0, 3, 1, 0] = torch.nan
        return q, k, v

    run = make_run("radial", 1, warmup=0.0, precision="auto:int8")
    _steps(run, 1, broken)
    assert run.status().layers[0].wide_heads == [1]


# -- tiny Wan -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe() -> Any:
    pytest.importorskip("diffusers")
    from dit_accel.demo.pipeline import load

    return load(TINY_WAN, torch.device("cpu"))


CALL: dict[str, Any] = {
    "height": 64,
    "width": 64,
    "num_frames": 17,
    "num_inference_steps": 2,
    "guidance_scale": 4.0,
    "output_type": "latent",
}


def _latents(pipe: Any) -> Tensor:
    found = pipe(prompt="octopus", generator=torch.Generator().manual_seed(0), **CALL).frames
    assert isinstance(found, Tensor)
    return found


def test_presets_on_tiny_wan(pipe: Any) -> None:
    """The masks are the same, so that only the format tells the latents apart."""
    options = {key: value for key, value in CALL.items() if key != "num_inference_steps"}
    plan = dit_accel.calibrate(pipe, ["octopus"], "paro_int8", num_inference_steps=2, **options)
    assert plan.method == get_method("paro_int8")
    latents = {}
    for name in ("paro", "paro_int8", "paro_int4"):
        plan.method = get_method(name)
        with dit_accel.enabled(pipe, name, plan=plan, min_tokens=0) as handle:
            latents[name] = _latents(pipe)
            (status,) = handle.stats().values()
        assert status.sparse_calls == status.calls > 0
        assert {layer.precision for layer in status.layers} == {get_method(name).precision}
    wide = latents["paro"]
    int8, int4 = (float((latents[name] - wide).norm() / wide.norm()) for name in ("paro_int8", "paro_int4"))
    assert 1e-5 < int8 < 0.1
    assert 2 * int8 < int4 < 0.6


def test_auto_on_tiny_wan(pipe: Any) -> None:
    latents = []
    for precision in ("auto", "bf16"):
        with dit_accel.enabled(pipe, precision=precision, density=0.4, warmup=0.5, min_tokens=0) as handle:
            latents.append(_latents(pipe))
            (status,) = handle.stats().values()
        assert handle.method.name == "auto"
        assert status.sparse_calls > 0
        assert {layer.precision for layer in status.layers} == {"int8_fp8" if precision == "auto" else "bf16"}
        assert not status.notes
    narrow, wide = latents
    assert 1e-6 < float((narrow - wide).norm() / wide.norm()) < 0.1
