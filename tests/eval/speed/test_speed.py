"""Speed: shares, ceilings, energy, the dense baseline, and that no time comes without quality."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

import dit_accel
from dit_accel_eval.cli.bench import print_bench
from dit_accel_eval.runs import EvalError
from dit_accel_eval.speed import BenchOptions, bench
from dit_accel_eval.speed.baseline import choose_backend, transformers_of, using
from dit_accel_eval.speed.energy import EnergyMeter
from dit_accel_eval.speed.share import attention_share, ceiling

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="session")
def tiny_wan() -> Any:
    pytest.importorskip("diffusers")
    from dit_accel_eval.runs.pipeline import load_pipeline

    return load_pipeline(ROOT / "examples/tiny_wan", torch.device("cpu"))


def test_the_ceiling_is_amdahls() -> None:
    assert ceiling(0.5, 1.0) == 1
    assert ceiling(0.5, 0.0) == 2
    assert ceiling(0.8, 0.25) == pytest.approx(2.5)
    assert ceiling(0.0, 0.1) == 1


def test_no_energy_on_a_cpu() -> None:
    meter = EnergyMeter(torch.device("cpu"))
    assert "cpu" in str(meter.missing)
    assert meter.joules() is None


def test_energy_is_read_by_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([0, 1500, 4500])
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(readings) if handle == "GPU-abc" else None,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc"))
    meter = EnergyMeter(torch.device("cuda"))
    assert meter.missing is None
    assert (meter.joules(), meter.joules()) == (1.5, 4.5)


def test_bad_numbers_are_refused() -> None:
    for options, message in (
        (BenchOptions(repeats=0), "repeats must be at least 1"),
        (BenchOptions(prompt=" "), "prompt must not be empty"),
    ):
        with pytest.raises(EvalError, match=message):
            bench(None, options)


@pytest.mark.slow
def test_the_fastest_backend_is_taken_and_all_is_put_back(tiny_wan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    monkeypatch.setattr("dit_accel_eval.speed.baseline._CANDIDATES", ("native", "_native_math", "sage", "nonsense"))
    fake = SimpleNamespace(transformer=tiny_wan.transformer, _execution_device="cuda")
    processor = next(m.processor for m in tiny_wan.transformer.modules() if hasattr(m, "processor"))
    before = _AttentionBackendRegistry._active_backend
    times = {AttentionBackendName.NATIVE: 2.0, AttentionBackendName._NATIVE_MATH: 1.0}
    found = choose_backend(fake, lambda: times[processor._attention_backend])
    assert found.name == "_native_math"
    assert found.seconds == {"native": 2.0, "_native_math": 1.0}
    assert "nonsense" in found.refused
    with using(fake, found.name):
        assert processor._attention_backend is AttentionBackendName._NATIVE_MATH
    assert processor._attention_backend is None
    assert _AttentionBackendRegistry._active_backend is before
    with pytest.raises(ValueError, match="no dense attention backend works"):
        choose_backend(fake, lambda: 1.0, "nonsense")
    assert len(transformers_of(fake)) == 1


@pytest.mark.slow
def test_the_share_of_attention_is_what_its_calls_take(tiny_wan: Any) -> None:
    from dit_accel_eval.generate import generate

    call = {"num_frames": 9, "height": 64, "width": 64, "num_inference_steps": 2}

    def denoise() -> float:
        return generate(tiny_wan, ["crab"], [0], decode=False, **call).denoise_seconds

    share = attention_share(tiny_wan, denoise)
    assert share is not None
    assert 0.01 < share < 0.9
    # The same calls are a millionth of a loop that takes a million times as long.
    assert attention_share(tiny_wan, lambda: denoise() * 1e6) == pytest.approx(share / 1e6, rel=2)
    assert not dit_accel.status(tiny_wan)


@pytest.mark.slow
def test_a_bench_has_times_spread_and_quality(tiny_wan: Any) -> None:
    notes: list[str] = []
    options = BenchOptions(
        method="gna", density=0.9, repeats=2, warmup=0, frames=9, steps=2, size=(64, 64), options={"min_tokens": 0}
    )
    found = bench(tiny_wan, options, note=notes.append)
    for name in ("dense", "accelerated"):
        run = found[name]
        assert run["denoise_s"]["count"] == 2
        assert run["denoise_s"]["min"] <= run["denoise_s"]["median"] <= run["denoise_s"]["max"]
        assert run["step_ms"]["count"] == 4
        total = sum(run["step_ms_by_step"]) / 1e3
        assert total == pytest.approx(run["denoise_s"]["median"], rel=0.2)
    assert found["speedup"]["denoise_s"] == pytest.approx(
        found["dense"]["denoise_s"]["median"] / found["accelerated"]["denoise_s"]["median"]
    )
    assert found["baseline"]["name"] == "dense attention by torch SDPA, its own choice, eager, on cpu"
    assert found["engine"]["density"] <= 1
    assert found["attention"]["ceiling"] >= 1
    assert 10 < found["quality"]["psnr"] <= 100
    assert "run 2 of 2" in notes
    out = io.StringIO()
    print_bench(Console(file=out, width=200), found)
    assert "denoising, s" in out.getvalue()
    assert "PSNR, dB" in out.getvalue()
    assert not dit_accel.status(tiny_wan)
