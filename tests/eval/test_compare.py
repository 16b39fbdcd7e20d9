"""Comparisons: records, resuming, floor, errors, batches. On a fake pipeline where the engine does not matter."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dit_accel_eval.compare import Configuration, compare, summarise


class FakePipe:
    """Clips that follow from prompt and noise alone; knows what the comparison asks of a pipeline."""

    def __init__(self) -> None:
        self.transformer = torch.nn.Identity()
        self.scheduler = SimpleNamespace(timesteps=[0, 1])
        self._execution_device = torch.device("cpu")
        self.calls: list[tuple[str, ...]] = []

    def __call__(self, prompt: list[str], generator: list[torch.Generator], callback_on_step_end, **_: Any):
        self.calls.append(tuple(prompt))
        for step in range(2):
            self.transformer(torch.zeros(1))
            callback_on_step_end(self, step, None, {})
        clips = [torch.rand(4, 16, 16, 3, generator=g).numpy() for g in generator]
        return SimpleNamespace(frames=np.stack(clips))


ROWS = [Configuration("same"), Configuration("another seed", seed_offset=100, labels={"note": "floor"})]
PROMPTS = ["a", "b", "c"]


def test_records_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    found = []
    for batch in (1, 2):
        records = compare(FakePipe(), PROMPTS, ROWS, tmp_path / f"{batch}.jsonl", batch=batch, num_frames=4)
        assert [(r["name"], r["prompt"], r["seed"]) for r in records if r["name"] == "same"] == [
            ("same", p, i) for i, p in enumerate(PROMPTS)
        ]
        found.append({(r["name"], r["prompt"]): r["psnr"] for r in records})
    assert found[0] == found[1]
    assert found[0]["same", "a"] == 100
    assert found[0]["another seed", "a"] < 10
    rows = summarise(records, ["same", "another seed", "absent"])
    assert [r["samples"] for r in rows] == [3, 3, 0]
    assert rows[2]["error"] == "not run"
    assert rows[1]["psnr_std"] > 0


def test_a_stopped_comparison_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "samples.jsonl"
    asked = iter([False, False, False, True])
    first = compare(FakePipe(), PROMPTS, ROWS, out, num_frames=4, stop=lambda: next(asked))
    assert [(r["name"], r["prompt"]) for r in first] == [("same", "a"), ("another seed", "a")]
    pipe, new = FakePipe(), []
    records = compare(pipe, PROMPTS, ROWS, out, num_frames=4, on_record=new.append)
    assert len(records) == 6
    assert [r["prompt"] for r in new] == ["b", "b", "c", "c"]
    assert ("a",) not in pipe.calls
    assert len(out.read_text().splitlines()) == 6
    pipe = FakePipe()
    assert compare(pipe, PROMPTS, ROWS, out, num_frames=4) == records
    assert not pipe.calls


def test_records_of_other_settings_do_not_count(tmp_path: Path) -> None:
    out = tmp_path / "samples.jsonl"
    compare(FakePipe(), PROMPTS[:1], ROWS, out, num_frames=4)
    for other in ({"num_frames": 5}, {"num_frames": 4, "tag": "other weights"}):
        pipe = FakePipe()
        assert len(compare(pipe, PROMPTS[:1], ROWS, out, **other)) == 2
        assert pipe.calls


def test_what_cannot_run_leaves_its_reason(tmp_path: Path) -> None:
    rows = [Configuration("bad", "auto", {"density": 2})]
    records = compare(FakePipe(), PROMPTS[:1], rows, tmp_path / "samples.jsonl")
    assert "error" in records[0]
    assert json.loads((tmp_path / "samples.jsonl").read_text())["name"] == "bad"
    assert "density must be above 0" in summarise(records, ["bad"])[0]["error"]


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names of their own"):
        compare(FakePipe(), PROMPTS, [ROWS[0], ROWS[0]], tmp_path / "x")
    with pytest.raises(ValueError, match="batch must be at least 1"):
        compare(FakePipe(), PROMPTS, ROWS, tmp_path / "x", batch=0)
