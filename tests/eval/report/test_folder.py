"""Reading a run: what is there, what is not, what is broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dit_accel_eval.report.folder import read_run


def test_a_finished_run(build_run, tmp_path: Path) -> None:
    run = read_run(build_run(tmp_path / "run"))
    assert [row.name for row in run.rows] == ["dense", "another seed", "auto 0.5", "auto 0.2", "adaspa 0.2"]
    assert [row.floor for row in run.rows] == [False, True, False, False, False]
    assert [row.accelerated for row in run.rows] == [False, False, True, True, True]
    assert run.missing() == {}
    assert run.errors() == []
    assert list(run.problems) == []
    assert [s.index for s in run.good("auto 0.5")] == [0, 1, 2, 3]
    assert all(s.frames is not None and s.frames.is_file() for s in run.good("dense"))


def test_what_is_missing_is_known(build_run, tmp_path: Path) -> None:
    folder = build_run(
        tmp_path / "run",
        missing=(("auto 0.2", 3),),
        errors=(("adaspa 0.2", 1),),
        rows=["dense", "auto 0.2", "adaspa 0.2"],
    )
    run = read_run(folder)
    assert run.missing() == {"auto 0.2": [(3, 0)]}
    assert [(s.name, s.index) for s in run.errors()] == [("adaspa 0.2", 1)]
    assert [s.index for s in run.good("adaspa 0.2")] == [0, 2, 3]


def test_broken_files_are_named_and_the_rest_is_read(build_run, tmp_path: Path) -> None:
    folder = build_run(tmp_path / "run", results=False)
    place = folder / "samples" / "auto-0.5"
    (place / "0001_0.json").write_text("{")
    (place / "0002_0.json").write_text('{"name": "auto 0.5"}')
    (place / ".tmp-r0-0003_0-abc.json").write_text("{")
    run = read_run(folder)
    assert [s.index for s in run.good("auto 0.5")] == [0, 3]
    assert len(run.problems) == 3
    told = " ".join(run.problems)
    assert "0001_0.json" in told
    assert "0002_0.json" in told
    assert "results.json is missing" in told
    assert ".tmp" not in told
    assert run.missing() == {"auto 0.5": [(1, 0), (2, 0)]}


def test_numbers_that_json_should_not_hold_do_not_reach_the_report(build_run, tmp_path: Path) -> None:
    folder = build_run(tmp_path / "run")
    path = folder / "samples" / "auto-0.5" / "0000_0.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "metrics": {"psnr": float("nan"), "ssim": "high"}}))
    assert dict(read_run(folder).good("auto 0.5")[0].metrics) == {"psnr": None, "ssim": None}


def test_what_is_no_run_is_refused(build_run, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no run.json"):
        read_run(tmp_path)
    folder = build_run(tmp_path / "run")
    (folder / "run.json").write_text('{"version": 2}')
    with pytest.raises(ValueError, match="must be of version 1, got 2"):
        read_run(folder)
    (folder / "run.json").write_text("[1]")
    with pytest.raises(ValueError, match="must hold a JSON object"):
        read_run(folder)
