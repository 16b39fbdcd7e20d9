"""Prompts, rows and settings: what is accepted, and what is said of the rest."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from dit_accel_eval.compare import Configuration
from dit_accel_eval.runs import EvalError, EvalOptions
from dit_accel_eval.runs.pipeline import call_arguments
from dit_accel_eval.runs.prompts import read_prompts, split_prompts
from dit_accel_eval.runs.rows import build_rows, why_unreachable
from dit_accel_eval.runs.settings import RunSettings, Sample


def test_text_has_one_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffa cat\n\n# no prompt\n  a dog \n", encoding="utf-8")
    assert read_prompts(path) == ["a cat", "a dog"]


def test_json_has_prompts_or_vbench_entries(tmp_path: Path) -> None:
    path = tmp_path / "VBench_full_info.json"
    path.write_text(json.dumps([{"prompt_en": "a cat", "dimension": ["x"]}, "a dog"]))
    assert read_prompts(path) == ["a cat", "a dog"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"\n# only a remark\n", "empty.txt has no prompt"),
        ("empty.json", b"[]", "empty.json has no prompt"),
        ("binary.txt", b"\xff\xfe\x00\x81", "binary.txt cannot be read"),
        ("broken.json", b"[1,", "broken.json is not JSON"),
        ("mapping.json", b"{}", "must hold a list"),
        ("number.json", b"[3]", "item 0 must be a prompt"),
        ("blank.json", b'[{"prompt": " "}]', "item 0 must be a prompt"),
    ],
)
def test_bad_prompt_files_are_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(EvalError, match=message):
        read_prompts(tmp_path / name)


def test_a_missing_prompt_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match=r"no prompts at .*nothing\.txt"):
        read_prompts(tmp_path / "nothing.txt")


def test_calibration_prompts_lie_behind_the_limit() -> None:
    assert split_prompts(["a", "b", "a", "c", "d", "e"], 2, 2) == (["a", "b"], ["c", "d"])
    assert split_prompts(["a", "b"], None, 2) == (["a", "b"], [])
    with pytest.raises(EvalError, match="limit must be at least 1"):
        split_prompts(["a"], 0, 2)


def test_static_methods_need_prompts_of_their_own() -> None:
    options = EvalOptions(methods=["paro"], limit=2)
    assert options.prompts(["a", "b", "c"]) == (["a", "b"], ["c"])
    with pytest.raises(EvalError, match="paro must be calibrated on prompts apart"):
        options.prompts(["a", "b"])
    given = dataclasses.replace(options, calibration=["z"])
    assert given.prompts(["a", "b"]) == (["a", "b"], ["z"])
    with pytest.raises(EvalError, match=r"\['a'\] are in both"):
        dataclasses.replace(options, calibration=["a"]).prompts(["a", "b"])


def test_rows_are_methods_times_densities() -> None:
    rows = build_rows(["auto", "paro", "dense"], [0.5, 0.3], {"min_tokens": 0})
    assert [row.name for row in rows] == ["another seed", "auto 0.5", "auto 0.3", "paro 0.5", "paro 0.3", "dense"]
    assert rows[0].seed_offset == 1000
    assert rows[1].options == {"min_tokens": 0, "run_density": 0.5}
    assert rows[3].options == {"min_tokens": 0, "density": 0.5}  # the masks of a static method serve every step
    assert rows[1].labels == {"method": "auto", "target": 0.5}
    assert [row.name for row in build_rows(["auto"], [0.5], floor=False)] == ["auto 0.5"]


@pytest.mark.parametrize(
    ("methods", "densities", "options", "message"),
    [
        (["gma"], [0.5], {}, "unknown method 'gma'.*did you mean 'g?na'"),
        (["auto"], [1.5], {}, "density must be above 0 and at most 1, got 1.5"),
        (["auto"], [0.5], {"warmap": 0.1}, "unknown option 'warmap'"),
        ([], [0.5], {}, "at least one method"),
    ],
)
def test_bad_rows(methods: list[str], densities: list[float], options: dict[str, Any], message: str) -> None:
    with pytest.raises(EvalError, match=message):
        build_rows(methods, densities, options)


def test_what_the_warm_up_exceeds_is_foreseen() -> None:
    low, high = build_rows(["auto"], [0.2, 0.8], floor=False)
    assert "run_density=0.2 cannot be reached" in str(why_unreachable(low, 5))
    assert why_unreachable(high, 5) is None
    assert why_unreachable(low, None) is None


def make_settings(**changes: Any) -> RunSettings:
    data: dict[str, Any] = {
        "pipeline": {"id": "x", "digest": "1"},
        "prompts": ("a", "b", "c"),
        "seeds": (0, 7),
        "rows": (Configuration("auto 0.5", "auto", {"run_density": 0.5}, labels={"target": 0.5}),),
        "call": {"num_inference_steps": 2},
        "metrics": ("psnr",),
    }
    return RunSettings(**{**data, **changes})


def test_settings_survive_json() -> None:
    settings = make_settings(command="dit-accel eval")
    again = RunSettings.from_dict(json.loads(json.dumps(settings.to_dict())))
    assert again == settings
    assert not again.differences(settings)


def test_samples_are_prompts_times_seeds_in_groups() -> None:
    settings = make_settings(batch=4)
    assert settings.samples == [Sample(i, s) for i in range(3) for s in (0, 7)]
    assert [len(group) for group in settings.groups] == [4, 2]
    assert Sample(3, 7).stem == "0003_7"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"call": {"num_inference_steps": 3}}, "call.num_inference_steps: 2 there, 3 here"),
        ({"pipeline": {"id": "x", "digest": "2"}}, "pipeline.digest: '1' there, '2' here"),
        ({"prompts": ("a", "b")}, r"prompts: 3 there \(a, b, c\), 2 here \(a, b\)"),
        ({"seeds": (0, 8)}, "seeds: 0, 7 there, 0, 8 here"),
        ({"rows": (Configuration("gna 0.5", "gna"),)}, "configuration names: auto 0.5 there, gna 0.5 here"),
        ({"rows": (Configuration("auto 0.5", "auto", {"run_density": 0.4}, labels={"target": 0.5}),)}, "run_density"),
        ({"batch": 2}, "batch: 1 there, 2 here"),
    ],
)
def test_differences_are_told(changes: dict[str, Any], told: str) -> None:
    import re

    found = make_settings(**changes).differences(make_settings())
    assert len(found) == 1
    assert re.search(told, found[0])


def test_threads_and_command_are_no_difference() -> None:
    assert not make_settings(threads=4, command="x").differences(make_settings())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": ()}, "at least one prompt"),
        ({"prompts": ("a", " ")}, "none may be empty"),
        ({"seeds": (1, 1)}, "different numbers"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"rows": (Configuration("dense"),)}, "names of their own"),
    ],
)
def test_bad_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(EvalError, match=message):
        make_settings(**changes)


def test_broken_run_files_are_refused() -> None:
    with pytest.raises(EvalError, match="version 1, got 2"):
        RunSettings.from_dict({"version": 2})
    with pytest.raises(EvalError, match="parts missing"):
        RunSettings.from_dict({"version": 1})


def test_a_cpu_gets_small_clips(make_pipe: Any) -> None:
    class Video(make_pipe):  # type: ignore[misc, valid-type]
        def __call__(  # type: ignore[override]
            self, prompt: Any, height: int = 480, width: int = 832, num_frames: int = 81, num_inference_steps: int = 50
        ) -> None:
            raise AssertionError("nothing is generated here")

    small = {"num_inference_steps": 8, "num_frames": 17, "height": 128, "width": 128}
    assert call_arguments(Video()) == small
    assert call_arguments(Video(), size=(64, 96), steps=3) == {
        "num_inference_steps": 3,
        "num_frames": 17,
        "height": 64,
        "width": 96,
    }
    on_gpu = Video()
    on_gpu._execution_device = "cuda"
    assert call_arguments(on_gpu) == {"num_inference_steps": 50, "num_frames": 81, "height": 480, "width": 832}
    with pytest.raises(EvalError, match="knows no argument 'guidance_scale'"):
        call_arguments(Video(), guidance=4.0)
