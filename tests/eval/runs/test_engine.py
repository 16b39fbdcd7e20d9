"""What is written of the engine, and attention against dense, on the trained small pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import dit_accel
from dit_accel_eval.attention import cosine, cosine_by_head, relative_l1, relative_l1_by_head
from dit_accel_eval.compare import Configuration
from dit_accel_eval.generate import generate
from dit_accel_eval.runs import EvalOptions, evaluate
from dit_accel_eval.runs.attention_probe import probe_attention
from dit_accel_eval.runs.engine import engine_record

LAYERS, HEADS = 7, 5


def test_by_head_is_the_metric_of_each_head() -> None:
    a, b = torch.randn(2, 2, 6, 3, 4).unbind(0)
    for head in range(3):
        one, two = a[:, :, head], b[:, :, head]
        assert float(relative_l1_by_head(a, b)[head]) == pytest.approx(relative_l1(one, two))
        assert float(cosine_by_head(a, b)[head]) == pytest.approx(cosine(one, two))


@pytest.mark.slow
def test_the_record_of_a_call(tiny_wan: Any, small_call: dict[str, Any]) -> None:
    with dit_accel.enabled(tiny_wan, "auto", density=0.4, min_tokens=0) as handle:
        generate(tiny_wan, ["crab"], [0], decode=False, **small_call)
        record, plan_ms = engine_record(handle, with_map=True)
        status = handle.stats()["transformer"]
    assert plan_ms == status.plan_ms > 0
    assert record["density"] == status.density
    assert record["backend"] == "cpu"
    assert [layer["name"] for layer in record["layers"]] == [layer.name for layer in status.layers]
    assert record["calls"] == LAYERS * 4 * 2  # layers, steps, branches
    shares = record["density_map"]
    assert shares["steps"] == [0, 1, 2, 3]
    assert [[len(layer) for layer in step] for step in shares["values"]] == [[HEADS] * LAYERS] * 4
    dense_steps = [step for step, value in status.density_by_step.items() if value >= 1]
    for step, layers in zip(shares["steps"], shares["values"]):
        mean = sum(sum(layer) for layer in layers) / (LAYERS * HEADS)
        assert mean == pytest.approx(1.0 if step in dense_steps else status.sparse_density, abs=1e-3)


@pytest.mark.slow
def test_attention_is_compared_by_layer_head_and_step(tiny_wan: Any, small_call: dict[str, Any]) -> None:
    options = {"density": 0.4, "min_tokens": 0}
    found = probe_attention(tiny_wan, "auto", options, "crab", 0, small_call)
    records, summary = found["records"], found["summary"]
    assert {(r["layer"], r["step"]) for r in records} == {(i, s) for i in range(LAYERS) for s in (1, 2, 3)}
    assert all(len(r[name]) == HEADS for r in records for name in ("rel_l1", "cosine", "recall", "density"))
    # Of the mass of the best blocks, more is kept than their share; and what is skipped shows in the output.
    assert summary["density"] < summary["recall"] < 1
    assert 0.001 < summary["rel_l1"] < 1
    assert summary["cosine"] > 0.8
    assert len(summary["by_layer"]) == LAYERS
    assert list(summary["by_step"]) == ["1", "2", "3"]
    assert not dit_accel.status(tiny_wan)


@pytest.mark.slow
def test_all_blocks_give_dense_attention(tiny_wan: Any, small_call: dict[str, Any]) -> None:
    found = probe_attention(tiny_wan, "adaspa", {"density": 1.0, "min_tokens": 0}, "crab", 0, small_call)["summary"]
    assert found["density"] == pytest.approx(1, abs=1e-6)
    assert found["recall"] == pytest.approx(1, abs=1e-4)
    assert found["cosine"] == pytest.approx(1, abs=1e-4)
    assert found["rel_l1"] < 1e-3


@pytest.mark.slow
def test_a_static_method_is_calibrated_once(tmp_path: Path, tiny_wan: Any, small_call: dict[str, Any]) -> None:
    rows = [Configuration("paro", "paro", {"density": 0.5, "min_tokens": 0})]
    call = {**small_call, "num_inference_steps": 2}
    options = EvalOptions(configurations=rows, metrics=["psnr"], call=call, limit=1, calibration=["owl"])
    first = evaluate(tiny_wan, ["crab"], tmp_path, options)
    plan = tmp_path / "plans/paro.safetensors"
    made = plan.read_bytes()
    assert first is not None
    row = first["rows"][1]
    assert row["density"]["run"] == pytest.approx(0.5, abs=0.2)
    assert row["attention"]["calls"] == 2 * LAYERS
    assert 10 < row["metrics"]["psnr"]["mean"] < 60
    plan.unlink()
    (tmp_path / "samples/paro/0000_0.json").unlink()
    again = evaluate(tiny_wan, ["crab"], tmp_path, options)
    assert plan.read_bytes() == made  # calibration has noise of its own, the same each time
    assert again is not None
    assert again["rows"][1]["metrics"] == row["metrics"]
