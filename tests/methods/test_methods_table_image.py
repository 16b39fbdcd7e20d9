"""The table of methods for a model of pictures: its defaults, its call, and what its page holds besides."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import methods_table  # noqa: E402
from _table_models import call_of, is_image, lacking, model_folder  # noqa: E402
from _table_pages import join, overview, picture_of, reasons, tables  # noqa: E402
from _table_queue import read_samples  # noqa: E402
from _table_rows import summary  # noqa: E402

from dit_accel_eval.files import append_record  # noqa: E402


def _arguments(monkeypatch: pytest.MonkeyPatch, *words: str) -> Any:
    monkeypatch.setattr(sys, "argv", ["methods_table.py", *words])
    return methods_table.arguments()


def test_video_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    args = _arguments(monkeypatch)
    assert args.model == ROOT / "examples/tiny_wan"
    assert args.density == [0.5, 0.3, 0.2, 0.1]
    assert args.metrics == ["psnr", "ssim", "lpips_alex", "flicker_difference"]
    assert args.out == Path("methods-table")
    call = {"height": 128, "width": 128, "num_frames": 65, "guidance_scale": 4.0, "num_inference_steps": 30}
    assert call_of(args) == call
    toy = _arguments(monkeypatch, "--toy", "--density", "0.1")
    assert (toy.count, toy.frames, toy.steps, toy.density, toy.size) == (1, 17, 6, [0.6], 128)


def test_pictures_have_defaults_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    args = _arguments(monkeypatch, "--model", "tiny_flux", "--steps", "12")
    assert args.model == ROOT / "examples/tiny_flux"
    assert is_image(args.model)
    assert args.density == [0.5, 0.3, 0.2]
    assert "flicker_difference" not in args.metrics
    assert args.out == ROOT / "benchmarks/results/methods_table_image"
    assert call_of(args) == {"height": 256, "width": 256, "num_inference_steps": 12, "max_sequence_length": 128}


def test_methods_about_frames_say_that_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "one frame" in str(lacking("radial", _arguments(monkeypatch, "--model", "tiny_flux")))
    assert lacking("bra", _arguments(monkeypatch, "--model", "tiny_flux")) is None
    assert lacking("radial", _arguments(monkeypatch)) is None


def test_a_model_is_a_folder_or_an_example(tmp_path: Path) -> None:
    assert model_folder(str(tmp_path)) == tmp_path
    assert model_folder("tiny_wan") == ROOT / "examples/tiny_wan"
    assert model_folder("no_such") == Path("no_such")


def test_the_picture_is_named_after_the_page() -> None:
    assert picture_of(Path("docs/methods_table.md")) == "methods_pareto.svg"
    assert picture_of(Path("docs/methods_table_image.md")) == "methods_pareto_image.svg"


def test_what_no_row_has_is_no_column_and_refusals_are_told(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    base = {"prompt": "cat", "ssim": 0.9, "lpips_alex": 0.1, "density": 0.5}
    told = {"name": "lite 0.5", "method": "lite", "target": 0.5, "prompt": "cat", "error": "0.5 cannot be reached"}
    records = [
        {**base, "name": "auto 0.5", "method": "auto", "target": 0.5, "psnr": 30.0},
        told,
        {**told, "name": "lite 0.3", "target": 0.3, "error": "0.3 cannot be reached"},
    ]
    rows = summary(records)
    assert "flicker" not in tables(rows)
    assert "| `lite` | 0.3 | 0.3 cannot be reached |\n| `lite` | 0.5 | 0.5 cannot be reached |" in reasons(rows)
    (tmp_path / "docs/assets").mkdir(parents=True)
    page = tmp_path / "docs/methods_table_image.md"
    names = ("overview", "tables", "ranks", "reasons")
    page.write_text("\n".join(f"<!-- {name} -->\nold\n<!-- end of {name} -->" for name in names))
    for record in records:
        append_record(tmp_path / "samples_0.jsonl", record)
    join(tmp_path, page)
    assert "| `lite` | 0.5 | 0.5 cannot be reached |" in page.read_text()
    assert (tmp_path / "docs/assets/methods_pareto_image.svg").is_file()


def test_the_committed_page_is_what_the_records_say() -> None:
    rows = summary(read_samples(ROOT / "benchmarks/results/methods_table_image"))
    page = (ROOT / "docs/methods_table_image.md").read_text(encoding="utf-8")
    for part in (overview(rows), tables(rows), reasons(rows)):
        assert part in page
