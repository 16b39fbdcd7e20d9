"""The demo end to end, on a random pipeline of the same layout, and on the trained one where it is."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from dit_accel.cli import app
from dit_accel_eval.video import read_clip

pytest.importorskip("diffusers")
runner = CliRunner()
TRAINED = Path(__file__).resolve().parents[2] / "examples" / "tiny_wan"


def demo(model: Path, out: Path, *arguments: str) -> tuple[dict, str]:
    common = ["demo", "--model", str(model), "--out", str(out), "--frames", "17", "--device", "cpu"]
    result = runner.invoke(app, [*common, *arguments])
    assert result.exit_code == 0, result.output
    return json.loads((out / "result.json").read_text()), result.stdout


def test_writes_everything_and_prints_what_it_measured(standin: Path, tmp_path: Path) -> None:
    found, text = demo(standin, tmp_path, "--steps", "4", "--prompt", "cat")
    assert {path.name for path in tmp_path.iterdir()} == set(found["files"])
    assert read_clip(tmp_path / "dense.mp4").shape == (17, 128, 128, 3)
    assert read_clip(tmp_path / "accelerated.mp4").shape == (17, 128, 128, 3)
    assert len(read_clip(tmp_path / "comparison.webp")) == 17
    with Image.open(tmp_path / "attention.png") as image:
        assert image.height > 1000  # four heads
    assert found["tokens"] == 2304
    assert found["backend"] == "cpu"
    assert found["method"]["name"] == "auto"
    # 2 layers, 2 branches, 4 steps; the first step is dense.
    assert (found["density"]["calls"], found["density"]["sparse_calls"]) == (16, 12)
    assert found["density"]["dense_calls"] == {"warm-up": 4}
    assert 0.2 < found["density"]["sparse"] < 0.35  # it falls from 0.4 to 0.1
    assert 0.3 < found["density"]["run"] < 0.9
    assert 0 < found["quality"]["ssim"] < 1
    assert 10 < found["quality"]["psnr"] < 100
    assert math.isclose(found["speedup"], found["seconds"]["dense"] / found["seconds"]["accelerated"])
    assert len(found["heads"]) == 4
    assert all(head["order"] for head in found["heads"])
    for word in ("PSNR", "SSIM", "speed-up", "warm-up", "not counted"):
        assert word in text


def test_a_static_method_is_calibrated_first(standin: Path, tmp_path: Path) -> None:
    found, text = demo(standin, tmp_path, "--steps", "2", "--method", "paro", "--run-density", "0.5", "--no-video")
    assert "calibrated on 2 other prompts, 2 steps each" in found["calibration"]
    assert "is static: calibrating on" in text
    assert found["density"]["sparse_calls"] == found["density"]["calls"] == 8
    assert found["density"]["run"] == pytest.approx(0.5, abs=0.04)
    assert set(found["files"]) == {"attention.png", "result.json"}


def test_everything_kept_is_dense(standin: Path, tmp_path: Path) -> None:
    found, _ = demo(standin, tmp_path, "--steps", "2", "--method", "gna", "--density", "1", "--no-video")
    assert found["density"]["sparse_calls"] > 0
    assert found["quality"]["psnr"] > 60


def test_what_stays_dense_is_said(standin: Path, tmp_path: Path) -> None:
    found, text = demo(standin, tmp_path, "--steps", "2", "--size", "64x64", "--no-video")
    assert found["density"]["sparse_calls"] == 0
    assert found["quality"]["psnr"] == 100
    assert "576 tokens are fewer than min_tokens=2048" in " ".join(found["density"]["dense_calls"])
    assert "min_tokens" in text


def test_frames_that_do_not_fit(standin: Path, tmp_path: Path) -> None:
    arguments = ["demo", "--model", str(standin), "--out", str(tmp_path), "--frames", "18"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 2
    assert "frames must be 1 + a multiple of 2 for this model, got 18; 17 and 19 fit" in result.stderr


@pytest.mark.slow
@pytest.mark.skipif(not (TRAINED / "model_index.json").is_file(), reason="examples/tiny_wan is not there")
def test_the_trained_model(tmp_path: Path) -> None:
    found, _ = demo(TRAINED, tmp_path, "--steps", "4", "--no-video")
    assert found["tokens"] == 2304
    assert found["density"]["sparse_calls"] > 0
    assert found["quality"]["psnr"] > 15
