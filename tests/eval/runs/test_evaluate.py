"""A run from beginning to end on a pipeline without a model: results, interruptions, processes, failures."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dit_accel_eval.compare import Configuration
from dit_accel_eval.runs import EvalError, EvalOptions, Observer, Ranks, evaluate
from dit_accel_eval.runs.summary import mean_std_ci, without_times

PROMPTS = ["a", "b", "c"]
Make = Callable[..., EvalOptions]


def results(folder: Path) -> str:
    """What must not depend on interruptions, as text."""
    return json.dumps(without_times(json.loads((folder / "results.json").read_text())), sort_keys=False)


def names(found: dict[str, Any] | None) -> list[str]:
    assert found is not None
    return [row["name"] for row in found["rows"]]


def test_results(tmp_path: Path, make_pipe: Any, fake_options: Make) -> None:
    found = evaluate(make_pipe(), PROMPTS, tmp_path, fake_options(seeds=(0, 1)))
    assert names(found) == ["dense", "same", "another seed"]
    assert found is not None
    dense, same, floor = found["rows"]
    assert (dense["samples"], same["samples"], floor["samples"]) == (6, 6, 6)
    assert same["metrics"]["psnr"] == {"mean": 100.0, "std": 0.0, "ci95": 0.0}
    assert floor["metrics"]["psnr"]["mean"] < 10
    assert floor["metrics"]["psnr"]["std"] > 0
    assert dense["metrics"] == {}
    assert json.loads((tmp_path / "results.json").read_text()) == found
    record = json.loads((tmp_path / "samples/another-seed/0002_1.json").read_text())
    assert (record["prompt"], record["seed"], record["error"]) == ("c", 1, None)
    assert len(record["speed"]["step_ms"]) == 2
    with np.load(tmp_path / "samples/dense/0002_1.npz") as data:
        assert data["frames"].shape == (4, 16, 16, 3)
        assert data["frames"].dtype == np.uint8
    run = json.loads((tmp_path / "run.json").read_text())
    assert [row["name"] for row in run["configurations"]] == ["same", "another seed"]
    assert run["environment"]["versions"]["torch"]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_killed_run_ends_as_one_that_was_not(
    after: bool, tmp_path: Path, make_pipe: Any, fake_options: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed right before, or right after, each of the files that a run puts in its place."""
    real, moves = os.replace, 0
    kill_at: int | None = None

    def replace(source: Any, target: Any) -> None:
        nonlocal moves
        moves += 1
        if moves == kill_at and not after:
            raise KeyboardInterrupt
        real(source, target)
        if moves == kill_at:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", replace)
    evaluate(make_pipe(), PROMPTS[:2], tmp_path / "whole", fake_options())
    expected, count = results(tmp_path / "whole"), moves
    assert count == 14  # run.json, six clips with their records, results.json
    for place in range(1, count + 1):
        folder, moves, kill_at = tmp_path / str(place), 0, place
        with pytest.raises(KeyboardInterrupt):
            evaluate(make_pipe(), PROMPTS[:2], folder, fake_options())
        kill_at = None
        evaluate(make_pipe(), PROMPTS[:2], folder, fake_options())
        assert results(folder) == expected


def test_finished_work_is_not_done_again(tmp_path: Path, make_pipe: Any, fake_options: Make) -> None:
    evaluate(make_pipe(), PROMPTS, tmp_path, fake_options())
    before = (tmp_path / "results.json").read_bytes()
    (tmp_path / "samples/same/0001_0.json").unlink()
    pipe = make_pipe()
    evaluate(pipe, PROMPTS, tmp_path, fake_options())
    assert pipe.calls == [("a",), ("b",)]  # the rehearsal and the sample; the dense clip was there
    assert without_times(json.loads(before)) == without_times(json.loads((tmp_path / "results.json").read_text()))
    pipe = make_pipe()
    evaluate(pipe, PROMPTS, tmp_path, fake_options())
    assert not pipe.calls


def test_batches_and_processes_change_nothing(tmp_path: Path, make_pipe: Any, fake_options: Make) -> None:
    evaluate(make_pipe(), PROMPTS, tmp_path / "one", fake_options())
    evaluate(make_pipe(), PROMPTS, tmp_path / "batch", fake_options(batch=2))
    found: list[Any] = [None] * 3

    def process(rank: int) -> None:
        found[rank] = evaluate(make_pipe(), PROMPTS, tmp_path / "three", fake_options(), ranks=Ranks(rank, 3))

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [part is None for part in found] == [False, True, True]
    assert results(tmp_path / "batch") == results(tmp_path / "three") == results(tmp_path / "one")


def test_other_settings_are_refused(tmp_path: Path, make_pipe: Any, fake_options: Make) -> None:
    evaluate(make_pipe(), PROMPTS, tmp_path, fake_options())
    kept = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(EvalError, match=r"other settings: call\.num_frames: 4 there, 5 here\. Give another --out"):
        evaluate(make_pipe(), PROMPTS, tmp_path, fake_options(frames=5))
    pipe = make_pipe()
    pipe.transformer.weight.data += 1
    with pytest.raises(EvalError, match=r"pipeline\.digest"):
        evaluate(pipe, PROMPTS, tmp_path, fake_options())
    assert sorted(path.name for path in tmp_path.rglob("*")) == kept


def test_metrics_left_open_are_those_of_the_run(tmp_path: Path, make_pipe: Any, fake_options: Make) -> None:
    evaluate(make_pipe(), PROMPTS[:1], tmp_path, fake_options(metrics=["psnr_clip"]))
    found = evaluate(make_pipe(), PROMPTS[:1], tmp_path, fake_options(metrics=None))
    assert found is not None
    assert set(found["rows"][1]["metrics"]) == {"psnr", "psnr_clip"}


def test_nan_in_one_clip_costs_that_clip(tmp_path: Path, make_pipe: Any, fake_options: Make) -> None:
    pipe = make_pipe()
    pipe.bad = {("a", 0), ("b", 1000)}  # a dense clip, and one of the other seed
    found = evaluate(pipe, PROMPTS, tmp_path, fake_options(batch=3))
    assert found is not None
    dense, same, floor = found["rows"]
    assert (dense["failed"], same["failed"], floor["failed"]) == (1, 1, 2)
    assert (dense["samples"], same["samples"], floor["samples"]) == (2, 2, 1)
    assert "prompt 'a', seed 0: clip has 1 values that are NaN" in dense["error"]
    assert "the dense clip of this sample failed" in floor["error"]
    record = json.loads((tmp_path / "samples/another-seed/0001_0.json").read_text())
    assert "seed 1000" in record["error"]
    assert not (tmp_path / "samples/another-seed/0001_0.npz").exists()
    again = make_pipe()
    repaired = evaluate(again, PROMPTS, tmp_path, fake_options(batch=3, retry_errors=True))
    assert repaired is not None
    assert [row["failed"] for row in repaired["rows"]] == [0, 0, 0]
    assert again.calls


def test_different_frame_counts_are_named(tmp_path: Path, make_pipe: Any, fake_options: Make) -> None:
    evaluate(make_pipe(), PROMPTS[:1], tmp_path, fake_options())
    (tmp_path / "samples/same/0000_0.json").unlink()
    np.savez_compressed(tmp_path / "samples/dense/0000_0.npz", frames=np.zeros((3, 16, 16, 3), np.uint8))
    found = evaluate(make_pipe(), PROMPTS[:1], tmp_path, fake_options())
    assert found is not None
    error = found["rows"][1]["error"]
    assert "samples/same/0000_0.npz" in error
    assert "4 and 3 frames" in error


def test_a_configuration_that_cannot_run_leaves_its_reason(tmp_path: Path, make_pipe: Any, fake_options: Make) -> None:
    rows = [Configuration("bad", "auto", {"density": 2}), Configuration("same")]
    found = evaluate(make_pipe(), PROMPTS, tmp_path, fake_options(configurations=rows))
    assert found is not None
    _, bad, same = found["rows"]
    assert (bad["samples"], bad["failed"], same["samples"]) == (0, 3, 3)
    assert "density must be above 0" in bad["error"]
    assert bad["attention"] is None


def test_dense_attention_that_cannot_run_stops_everything(tmp_path: Path, make_pipe: Any, fake_options: Make) -> None:
    pipe = make_pipe()
    pipe.transformer.forward = None
    with pytest.raises(EvalError, match="dense attention cannot run, so there is nothing to compare with"):
        evaluate(pipe, PROMPTS, tmp_path, fake_options())


def test_unknown_things_are_refused(tmp_path: Path, make_pipe: Any, fake_options: Make) -> None:
    for changes, message in (
        ({"metrics": ["psnrr"]}, "metric must be one of .*got 'psnrr'"),
        ({"profile": "x"}, "profile must be offline or official, got 'x'"),
        ({"call": {"nonsense": 1}}, "FakePipe knows no argument 'nonsense'"),
        ({"frames": 0}, "num_frames must be at least 1, got 0"),
        ({"limit": 0}, "limit must be at least 1"),
    ):
        with pytest.raises(EvalError, match=message):
            evaluate(make_pipe(), PROMPTS, tmp_path, fake_options(**{"metrics": ["psnr"], **changes}))
    assert not list(tmp_path.iterdir())


def test_missing_extractors_are_named(
    tmp_path: Path, make_pipe: Any, fake_options: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIT_ACCEL_EVAL_CACHE", str(tmp_path / "nothing"))
    with pytest.raises(EvalError, match=r"lpips_alex: .*dit-accel eval setup"):
        evaluate(make_pipe(), PROMPTS, tmp_path, fake_options(metrics=["lpips_alex"]))
    found = evaluate(make_pipe(), PROMPTS[:1], tmp_path, fake_options(metrics=None))  # left out where nobody asked
    assert found is not None
    assert "psnr" in found["rows"][1]["metrics"]
    assert "lpips_alex" not in found["rows"][1]["metrics"]


def test_metrics_over_all_clips(
    tmp_path: Path, make_pipe: Any, fake_options: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They see the clips that were made, once, and what they cannot be computed of is said in their place."""
    from dit_accel_eval.metrics import distribution

    calls: list[tuple[str, int]] = []

    def fake(clips: Any, references: Any, names: list[str], *, prompts: list[str], **_: Any) -> dict[str, Any]:
        clips, references = list(clips), list(references)
        calls.append((names[0], len(clips)))
        if names == ["kid"]:
            raise ValueError("too few clips")
        distance = sum(float(np.abs(a.astype(float) - b).mean()) for a, b in zip(clips, references)) / len(clips)
        return {names[0]: {"value": distance, "std": float("nan"), "prompts": len(prompts)}}

    monkeypatch.setattr(distribution, "evaluate", fake)
    monkeypatch.setattr(distribution, "available", lambda name, profile: None)
    pipe = make_pipe()
    pipe.bad = {("a", 1000)}
    options = fake_options(metrics=["psnr", "fid", "kid"])
    found = evaluate(pipe, PROMPTS, tmp_path, options)
    assert found is not None
    dense, same, floor = found["rows"]
    assert dense["distribution"] == {}
    assert same["distribution"]["fid"] == {"value": 0.0, "std": None, "prompts": 3}
    assert floor["distribution"]["fid"]["value"] > 50
    assert floor["distribution"]["kid"] == {"value": None, "error": "too few clips"}
    assert calls == [("fid", 3), ("kid", 3), ("fid", 2), ("kid", 2)]
    assert evaluate(make_pipe(), PROMPTS, tmp_path, options) == found
    assert len(calls) == 4


def test_vbench_of_every_clip(tmp_path: Path, make_pipe: Any, fake_options: Make) -> None:
    found = evaluate(make_pipe(), PROMPTS, tmp_path, fake_options(metrics=["vbench:temporal_flickering"]))
    assert found is not None
    for row in found["rows"]:  # noise: neighbouring frames differ by a third of the range on average
        assert row["vbench"]["temporal_flickering"]["mean"] == pytest.approx(2 / 3, abs=0.02)
        assert "totals" not in row["vbench"]
    with pytest.raises(EvalError, match="dimensions are .*got 'nonsense'"):
        evaluate(make_pipe(), PROMPTS, tmp_path, fake_options(metrics=["vbench:nonsense"]))


def test_the_observer_sees_everything(tmp_path: Path, make_pipe: Any, fake_options: Make) -> None:
    seen: list[Any] = []

    class Listener(Observer):
        def begin(self, total: int, done: int) -> None:
            seen.append((total, done))

        def step(self, done: int, steps: int | None) -> None:
            seen.append(("step", done, steps))

        def record(self, record: Any, sample: Any) -> None:
            seen.append((record["name"], sample.index))

    evaluate(make_pipe(), PROMPTS[:1], tmp_path, fake_options(), observer=Listener())
    steps = [("step", 1, 2), ("step", 2, 2)]
    rows = [("dense", 0), ("same", 0), ("another seed", 0)]
    assert seen == [(3, 0), *[event for row in rows for event in (*steps, row)]]


def test_confidence_intervals() -> None:
    """Student's t for 4 values: 3.1824 standard errors, as tables have it."""
    found = mean_std_ci([1.0, 2.0, 3.0, 4.0])
    assert found["mean"] == 2.5
    assert found["std"] == pytest.approx(1.29099, abs=1e-5)
    assert found["ci95"] == pytest.approx(3.18245 * 1.29099 / 2, abs=1e-4)
    assert mean_std_ci([1.0]) == {"mean": 1.0, "std": None, "ci95": None}
