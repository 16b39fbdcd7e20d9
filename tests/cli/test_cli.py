"""The command line: listings, their JSON, and errors that are one line and exit code 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from rich.text import Text
from typer.testing import CliRunner

import dit_accel
from dit_accel.cli import app

runner = CliRunner()


def run_json(*arguments: str):
    result = runner.invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def fails(*arguments: str) -> str:
    """The one line of an error."""
    result = runner.invoke(app, list(arguments))
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    lines = [line for line in result.stderr.splitlines() if line]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def test_version() -> None:
    result = runner.invoke(app, ["--version"])
    assert result.stdout.strip() == dit_accel.__version__


def test_methods() -> None:
    found = run_json("methods")
    assert [m["name"] for m in found] == [m.name for m in dit_accel.methods()]
    assert dit_accel.Method.from_dict(found[0]) == dit_accel.methods()[0]
    assert [m["name"] for m in run_json("methods", "auto")] == ["auto"]
    table = runner.invoke(app, ["methods"]).stdout
    assert all(m.name in table for m in dit_accel.methods())
    assert "selection" in runner.invoke(app, ["methods", "paro"]).stdout
    assert "unknown method 'atuo'" in fails("methods", "atuo")


def test_models() -> None:
    found = run_json("models")
    assert {"WanTransformer3DModel", "FluxTransformer2DModel"} <= {m["model"] for m in found}
    assert {"model", "family", "task", "note", "blocks"} <= set(found[0])
    assert "WanTransformer3DModel" in runner.invoke(app, ["models"]).stdout


def test_env() -> None:
    found = run_json("env")
    machine = {"python", "platform", "cpu", "cuda", "hip", "gpus"}
    assert set(found) == {*machine, "versions", "backends", "settled_calls", "variables"}
    assert found["settled_calls"]["in_c"] == (found["settled_calls"]["reason"] is None)
    assert "settled calls" in runner.invoke(app, ["env"]).stdout
    assert found["versions"]["dit-accel"] == dit_accel.__version__
    assert found["versions"]["torch"]
    backends = {row["name"]: row for row in found["backends"]}
    assert {"triton", "cpu", "reference"} <= set(backends)
    assert sum(row["automatic"] for row in backends.values()) == 1
    for row in backends.values():
        assert row["usable"] == (row["reason"] is None)
        assert row["usable"] or not row["automatic"]
    text = runner.invoke(app, ["env"]).stdout
    assert "torch" in text
    assert "reference" in text


def test_help_names_every_command() -> None:
    text = runner.invoke(app, ["--help"]).stdout
    assert all(name in text for name in ("demo", "methods", "models", "env"))


def test_help_loses_no_default_in_brackets() -> None:
    """Words in square brackets are styles to rich: `the method's own` would vanish."""
    for command in typer.main.get_command(app).commands.values():  # type: ignore[attr-defined]
        for option in command.params:
            text = getattr(option, "help", None) or ""
            assert Text.from_markup(text).plain == text, (command.name, option.name)


def test_models_have_one_row_a_family() -> None:
    text = runner.invoke(app, ["models"], env={"COLUMNS": "250"}).stdout
    families = {row["family"] for row in run_json("models")}
    rows = [cells[2].strip() for line in text.splitlines() if len(cells := line.split("│")) > 3 and cells[2].strip()]
    assert sorted(rows) == sorted(families)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--method", "nope"], "unknown method 'nope'"),
        (["--density", "0"], "density must be above 0 and at most 1"),
        (["--density", "2"], "density must be above 0 and at most 1"),
        (["--run-density", "0"], "run-density must be above 0 and at most 1, got 0"),
        (["--run-density", "0.05"], "run_density=0.05 cannot be reached"),
        (["--density", "0.5", "--run-density", "0.5"], "not both"),
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--frames", "0"], "frames must be at least 1, got 0"),
        (["--prompt", " "], "prompt must not be empty"),
        (["--size", "128"], "size must be HEIGHTxWIDTH"),
        (["--size", "100x128"], "size must be multiples of 16 pixels"),
        (["--device", "tpu"], "device must be auto, cpu or cuda, got 'tpu'"),
        (["--model", "/nowhere"], "no diffusers pipeline at /nowhere"),
    ],
)
def test_demo_refuses(arguments: list[str], complaint: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    model = [] if "--model" in arguments else ["--model", str(tmp_path)]
    assert complaint in fails("demo", *model, "--out", str(tmp_path / "out"), *arguments)


def test_demo_refuses_a_folder_that_it_cannot_write_to(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "file").write_text("")
    assert "cannot write to" in fails("demo", "--model", str(tmp_path), "--out", str(tmp_path / "file" / "out"))


def test_demo_names_missing_libraries_before_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import util

    find = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == "imageio_ffmpeg" else find(name))
    (tmp_path / "model_index.json").write_text("not json")
    told = fails("demo", "--model", str(tmp_path), "--out", str(tmp_path / "out"))
    assert "the demo needs imageio_ffmpeg: pip install 'dit-accel[diffusers,eval]'" in told
    told = fails("demo", "--model", str(tmp_path), "--out", str(tmp_path / "out"), "--no-video")
    assert "could not be loaded" in told  # clips alone need it


def test_demo_refuses_a_folder_that_is_no_pipeline(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("not json")
    assert "could not be loaded" in fails("demo", "--model", str(tmp_path), "--out", str(tmp_path / "out"))


def test_demo_says_where_the_model_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dit_accel.demo import options

    monkeypatch.setattr(options, "__file__", str(tmp_path / "dit_accel" / "demo" / "options.py"))
    monkeypatch.chdir(tmp_path)
    assert "ships in the repository" in fails("demo", "--out", str(tmp_path / "out"))
