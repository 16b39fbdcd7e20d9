"""The commands: what they refuse, with one line and exit code 2, and what they print."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from dit_accel_eval.cli import register
from dit_accel_eval.cli.shared import numbers, pairs, parse_size

ROOT = Path(__file__).resolve().parents[3]
WAN = str(ROOT / "examples/tiny_wan")
app = typer.Typer()
register(app)


def run(*arguments: str) -> tuple[int, str]:
    found = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "RANK": "0", "WORLD_SIZE": "1"})
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    return found.exit_code, found.output


def test_commands_are_there() -> None:
    code, text = run("--help")
    assert code == 0
    for name in ("eval", "bench", "report", "inspect"):
        assert name in text
    assert "setup" in run("eval", "--help")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--pipeline is needed"),
        (["--pipeline", WAN, "--density", "0.5,x"], "--density must be numbers between commas"),
        (["--pipeline", WAN, "--density", "2"], "density must be above 0 and at most 1, got 2"),
        (["--pipeline", WAN, "--method", "gma"], "unknown method 'gma'"),
        (["--pipeline", WAN, "--size", "64"], "size must be HEIGHTxWIDTH"),
        (["--pipeline", WAN, "--set", "warmup"], "--set takes KEY=VALUE"),
        (["--pipeline", WAN, "--prompts", "/nothing/prompts.txt"], "no prompts at /nothing/prompts.txt"),
        (["--pipeline", WAN, "--device", "tpu"], "device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        (["--pipeline", WAN, "--dtype", "int4"], "dtype must be auto"),
        (["--pipeline", WAN, "--frames", "18", "--limit", "1"], "frames must be 1 + a multiple of 2"),
        (
            ["--pipeline", WAN, "--density", "0.1", "--steps", "4"],
            "nothing can run: auto 0.1: run_density=0.1 cannot be",
        ),
    ],
)
def test_bad_options(arguments: list[str], message: str, tmp_path: Path) -> None:
    code, text = run("eval", *arguments, "--out", str(tmp_path / "run"))
    assert code == 2
    assert message in text
    assert not (tmp_path / "run").exists()


def test_an_empty_prompt_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "empty.txt"
    path.write_text("\n")
    code, text = run("eval", "--pipeline", WAN, "--prompts", str(path), "--out", str(tmp_path / "run"))
    assert code == 2
    assert f"{path} has no prompt" in text


def test_a_folder_that_is_no_pipeline_is_named(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n")
    code, text = run("eval", "--pipeline", str(tmp_path), "--out", str(tmp_path / "run"))
    assert code == 2
    assert "it has no model_index.json" in text


def test_a_dry_run_says_what_would_run(tmp_path: Path) -> None:
    options = ["--method", "auto,paro", "--density", "0.5,0.1", "--steps", "5", "--limit", "2", "--metrics", "psnr"]
    code, text = run("eval", "--pipeline", WAN, *options, "--out", str(tmp_path / "run"), "--dry-run")
    assert code == 0
    for part in ("auto 0.5", "paro 0.1", "is calibrated first", "another seed", "cannot be reached", "frog face, crab"):
        assert part in text
    assert "2 prompts x 1 seeds x 6 configurations, dense included: 12 clips" in text
    assert "time on one process unknown" in text  # nothing was measured
    assert "disk unknown" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_and_its_dry_run(tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ["--pipeline", WAN, "--method", "gna", "--density", "0.8", "--set", "min_tokens=0", "--limit", "1"]
    options += ["--frames", "9", "--steps", "3", "--size", "64x64", "--metrics", "psnr,ssim", "--no-report"]
    options += ["--no-attention", "--out", str(out)]
    code, text = run("eval", *options, "--dry-run", "--probe")
    assert code == 0
    assert "2 dense steps of" in text
    assert "unknown" not in text
    code, text = run("eval", *options)
    assert code == 0
    assert "3/3 gna 0.8, octopus, seed 0" in text
    assert "PSNR" in text
    code, text = run("eval", *options, "--dry-run")
    assert "still to make: 0 clips" in text
    code, text = run("report", str(out))
    assert code == 0, text
    assert (out / "report.html").is_file()
    assert (out / "summary.md").is_file()
    code, text = run("eval", *options[:-2], "--guidance", "3", "--out", str(out))
    assert code == 2
    assert "call.guidance_scale: None there, 3.0 here" in text


def test_report_of_nothing_is_refused(tmp_path: Path) -> None:
    code, text = run("report", str(tmp_path))
    assert code == 2
    assert "run.json" in text


def test_values_of_pairs_are_json_or_text() -> None:
    assert pairs(["warmup=0.1", "order=[1, 2]", "negative_prompt=so blurry", "empty="], "--set") == {
        "warmup": 0.1,
        "order": [1, 2],
        "negative_prompt": "so blurry",
        "empty": "",
    }
    assert numbers("0.5, 0.3", float, "x") == [0.5, 0.3]
    assert parse_size("480x832") == (480, 832)
    assert parse_size(None) is None
    with pytest.raises(ValueError, match="at least one"):
        numbers(" , ", int, "x")


def test_setup_fetches_what_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import dit_accel_eval.extractors as extractors

    asked: list[object] = []

    def setup(names: object, *, progress: Callable[[str], None]) -> None:
        asked.append(names)
        progress("fetched [x]")

    monkeypatch.setattr(extractors, "setup", setup)
    code, text = run("eval", "setup", "lpips-alex")
    assert code == 0
    assert asked == [["lpips-alex"]]
    assert "fetched [x]" in text
    assert str(extractors.cache_dir()) in text


@pytest.mark.slow
def test_attention_is_captured_and_shown(tmp_path: Path) -> None:
    options = ["--pipeline", WAN, "--frames", "9", "--steps", "2", "--size", "64x64", "--layers", "0", "--heads", "0,4"]
    code, text = run("inspect", *options, "--at", "1", "--method", "gna", "--tokens", "4", "--out", str(tmp_path / "x"))
    assert code == 0, text
    assert (tmp_path / "x/inspect.html").is_file()
    code, text = run("inspect", *options, "--layers", "99", "--out", str(tmp_path / "y"))
    assert code == 2
    assert "99" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "{blocked}/bench.json"], "cannot write {blocked}/bench.json"),
        (["--density", "2"], "density must be above 0 and at most 1, got 2"),
        (["--method", "gma"], "unknown method 'gma'"),
        (["--set", "denisty=0.3"], "did you mean 'density'"),
    ],
)
def test_bench_says_what_is_wrong_before_it_loads(arguments: list[str], message: str, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    (tmp_path / "model_index.json").write_text("not json, which is not read")
    given = [argument.format(blocked=blocked) for argument in arguments]
    code, text = run("bench", "--pipeline", str(tmp_path), "--prompt", "x", *given)
    assert code == 2
    assert message.format(blocked=blocked) in text


@pytest.mark.slow
def test_bench_prints_quality_beside_speed(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    options = [
        "--frames",
        "9",
        "--steps",
        "2",
        "--size",
        "64x64",
        "--repeats",
        "1",
        "--warmup",
        "0",
        "--density",
        "0.9",
    ]
    options += ["--set", "min_tokens=0"]
    code, text = run("bench", "--pipeline", WAN, "--method", "gna", *options, "--out", str(out))
    assert code == 0, text
    assert "PSNR, dB" in text
    assert "baseline: dense attention by torch SDPA, its own choice, eager, on cpu" in text
    assert json.loads(out.read_text())["quality"]["psnr"] > 10
    code, text = run("bench", "--pipeline", WAN, "--method", "paro", "--prompt", "x", "--prompts", "/nothing", *options)
    assert code == 2
    assert "no prompts at /nothing" in text
