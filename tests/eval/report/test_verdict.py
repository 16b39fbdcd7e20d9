"""The verdict: what is compared with what, and what is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dit_accel_eval.report.folder import Run, read_run
from dit_accel_eval.report.verdict import judge, worst_first

ROWS = ["dense", "another seed", "auto 0.5", "auto 0.2"]


def _set(folder: Path, slug: str, index: int, part: str, **values: Any) -> None:
    path = folder / "samples" / slug / f"{index:04d}_0.json"
    record = json.loads(path.read_text())
    record[part].update(values)
    path.write_text(json.dumps(record))


@pytest.fixture
def folder(build_run, tmp_path: Path) -> Path:
    return build_run(tmp_path / "run", rows=ROWS, prompts=["a", "b"], frames=2)


def _named(run: Run, name: str) -> Any:
    return next(v for v in judge(run) if v.row.name == name)


def test_numbers_and_the_sentence(folder: Path) -> None:
    for index, (fast, floor, seconds) in enumerate([(30.0, 12.0, 1.0), (24.0, 10.0, 1.5)]):
        _set(folder, "auto-0.5", index, "metrics", psnr=fast)
        _set(folder, "auto-0.5", index, "speed", denoise_s=seconds)
        _set(folder, "auto-0.5", index, "engine", density=0.4 + 0.2 * index)
        _set(folder, "another-seed", index, "metrics", psnr=floor)
        _set(folder, "dense", index, "speed", denoise_s=2.0)
    verdict = _named(read_run(folder), "auto 0.5")
    assert verdict.psnr == pytest.approx(27.0)
    assert verdict.work == pytest.approx(0.5)
    assert verdict.speedup == pytest.approx(4.0 / 2.5)
    assert verdict.worst.prompt == "b"
    assert verdict.margin == pytest.approx(14.0)
    assert verdict.clears_floor is True
    assert verdict.sentence == (
        "Saves 50% of the attention work of the run, planning included, and 38% of the denoising time (1.60 times as "
        "fast). PSNR 27.0 dB; worst prompt “b” (seed 0) at 24.0 dB. Clears the floor of dense with another seed on every "
        "sample, by at least 14.0 dB."
    )


def test_the_floor_is_judged_prompt_by_prompt(folder: Path) -> None:
    for index, floor in enumerate([10.0, 40.0]):
        _set(folder, "auto-0.5", index, "metrics", psnr=30.0)
        _set(folder, "another-seed", index, "metrics", psnr=floor)
    verdict = _named(read_run(folder), "auto 0.5")
    assert verdict.clears_floor is False
    assert "Clears the floor on 1 of 2 samples only." in verdict.sentence
    _set(folder, "another-seed", 0, "metrics", psnr=30.0)
    verdict = _named(read_run(folder), "auto 0.5")
    assert verdict.above_floor == 0
    assert "Does not clear the floor" in verdict.sentence


def test_slower_and_more_work_are_said(folder: Path) -> None:
    for index in range(2):
        _set(folder, "dense", index, "speed", denoise_s=1.0)
        _set(folder, "auto-0.5", index, "speed", denoise_s=2.0)
        _set(folder, "auto-0.5", index, "engine", density=1.2)
    said = _named(read_run(folder), "auto 0.5").sentence
    assert "Does 20% more attention work than dense" in said
    assert "takes 100% longer (0.50 times as fast)" in said


def test_time_is_compared_over_common_samples_only(build_run, tmp_path: Path) -> None:
    folder = build_run(tmp_path / "run", rows=ROWS, prompts=["a", "b"], frames=2, missing=(("dense", 1),))
    _set(folder, "dense", 0, "speed", denoise_s=3.0)
    _set(folder, "auto-0.5", 0, "speed", denoise_s=1.0)
    _set(folder, "auto-0.5", 1, "speed", denoise_s=100.0)
    assert _named(read_run(folder), "auto 0.5").speedup == pytest.approx(3.0)


def test_unfinished_and_failed_rows_say_so(build_run, tmp_path: Path) -> None:
    missing, errors = (("auto 0.5", 1),), (("auto 0.2", 0), ("auto 0.2", 1))
    folder = build_run(tmp_path / "run", rows=ROWS, prompts=["a", "b"], frames=2, missing=missing, errors=errors)
    run = read_run(folder)
    assert _named(run, "auto 0.5").sentence.startswith("Over 1 of 2 samples only:")
    assert _named(run, "auto 0.2").sentence == "No sample was made: RuntimeError: out of memory <now>"
    assert [v.row.name for v in judge(run)] == ["auto 0.5", "auto 0.2"]


def test_prompts_are_ordered_by_their_worst_clip(folder: Path) -> None:
    for index, values in enumerate([(30.0, 18.0), (20.0, 25.0)]):
        for slug, value in zip(("auto-0.5", "auto-0.2"), values):
            _set(folder, slug, index, "metrics", psnr=value)
    assert worst_first(read_run(folder)) == [((0, 0), 18.0), ((1, 0), 20.0)]


def test_metrics_below_the_floor_are_named(folder: Path) -> None:
    for index in range(2):
        _set(folder, "another-seed", index, "metrics", lpips_alex=0.10, ssim=0.5, flicker_difference=0.2, made_up=9.0)
        _set(folder, "auto-0.5", index, "metrics", lpips_alex=0.20, ssim=0.6, flicker_difference=0.1, made_up=1.0)
        _set(folder, "auto-0.2", index, "metrics", lpips_alex=0.05, ssim=0.5, flicker_difference=0.1, made_up=1.0)
    run = read_run(folder)
    assert _named(run, "auto 0.5").below == ("lpips_alex",)
    assert "In lpips_alex it is further from dense than another seed." in _named(run, "auto 0.5").sentence
    assert _named(run, "auto 0.2").below == ()


def test_work_that_is_not_what_was_asked_for_is_said(folder: Path) -> None:
    for index in range(2):
        _set(folder, "auto-0.5", index, "engine", density=0.515)
        _set(folder, "auto-0.2", index, "engine", density=0.585)
    run = read_run(folder)
    assert "asked for" not in _named(run, "auto 0.5").sentence
    assert "It was asked for 0.2 of the dense work and did 0.585." in _named(run, "auto 0.2").sentence


def test_a_narrow_margin_is_not_rounded_to_nothing(folder: Path) -> None:
    for index in range(2):
        _set(folder, "auto-0.5", index, "metrics", psnr=20.004)
        _set(folder, "another-seed", index, "metrics", psnr=20.0)
    assert "by at least 0.004 dB" in _named(read_run(folder), "auto 0.5").sentence
