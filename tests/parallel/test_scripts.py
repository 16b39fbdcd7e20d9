"""The example and the benchmark run as a user starts them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def start(*arguments: str, processes: int = 1, cwd: Path) -> str:
    """Run a script with this checkout's packages; its output."""
    roots = [str(ROOT / part) for part in ("", "kernels", "patches", "eval")]
    path = os.pathsep.join([*roots, os.environ.get("PYTHONPATH", "")])
    command = [sys.executable]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(port)]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DIT_ACCEL_BACKEND": "cpu"}
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, cwd=cwd, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["context", "data"])
def test_example_on_two_processes(tmp_path: Path, mode: str) -> None:
    pytest.importorskip("cv2")
    sizes = ["--frames", "9", "--size", "64", "--steps", "3", "--min-tokens", "0", "--count", "2"]
    script = str(ROOT / "examples" / "multi_gpu.py")
    told = start(script, "--mode", mode, "--out", str(tmp_path / "out"), *sizes, processes=2, cwd=tmp_path)
    clips = sorted(path.name for path in (tmp_path / "out").glob("*.mp4"))
    assert clips == (["context.mp4"] if mode == "context" else ["000.mp4", "001.mp4"])
    assert "density" in told
    assert "0 of" not in told


@pytest.mark.slow
def test_benchmark_at_toy_size(tmp_path: Path) -> None:
    script, out = str(ROOT / "benchmarks" / "e2e.py"), tmp_path / "e2e.json"
    chosen = ["--methods", "auto", "kept,hooked"]
    told = start(script, "--toy", "--cases", "toy-hunyuan", "--out", str(out), *chosen, cwd=tmp_path)
    record = json.loads(out.read_text())[-1]
    assert not record["failed"]
    assert {case["name"] for case in record["cases"]} == {"toy HunyuanVideo"}
    for case in record["cases"]:
        assert case["name"] in told
        assert case["attention_share"] > 0  # of two times: on a busy machine it may be above 1
        rows = case["methods"]
        assert rows["auto"]["density"] < 0.3
        assert rows["auto"]["ceiling"] > 1
        assert rows["kept"]["exact_density"] == 1
        assert set(rows["hooked"]["reasons"]) == {"warm-up"}
        for name, row in rows.items():
            assert row["speedup"] == pytest.approx(case["dense_ms"] / row["step_ms"])
            assert case["gate"][name]["kept"] < 1e-4
            assert name == "hooked" or set(row["reasons"]) == set()
    assert out.with_suffix(".csv").read_text().count("toy HunyuanVideo") == 3


@pytest.mark.slow
def test_brief_steps_of_a_whole_model(tmp_path: Path) -> None:
    script, out = str(ROOT / "benchmarks" / "e2e.py"), tmp_path / "e2e.json"
    chosen = ["--layers", "1", "--methods", "plain,kept8"]
    start(script, "--toy", "--cases", "toy-wan:whole", *chosen, "--out", str(out), cwd=tmp_path)
    (case,) = json.loads(out.read_text())[-1]["cases"]
    assert case["layers"] == case["of_layers"] == [2]
    assert case["attention_by"] == "attention alone"
    assert len(case["dense_all_ms"]) == 3  # such short steps are timed thrice
    assert 0 < case["gate"]["kept8"]["sparse"] < 1e-2
    assert case["methods"]["plain"]["density"] == pytest.approx(0.2, abs=0.05)
    assert "kept" not in case["gate"]["plain"]


@pytest.mark.slow
def test_preparing_passes_the_gate_and_measures_nothing(tmp_path: Path) -> None:
    script, out = str(ROOT / "benchmarks" / "e2e.py"), tmp_path / "e2e.json"
    assert start(script, "--toy", "--prepare", "--cases", "toy-flux", "--out", str(out), cwd=tmp_path) == ""
    assert not list(tmp_path.iterdir())
    with pytest.raises(AssertionError, match="not prepared, or not all of it: toy-flux"):
        start(script, "--toy", "--prepare", "--cases", "toy-flux", "--deadline", "1", cwd=tmp_path)


@pytest.mark.slow
def test_benchmark_writes_what_it_has_at_the_deadline(tmp_path: Path) -> None:
    script, out = str(ROOT / "benchmarks" / "e2e.py"), tmp_path / "e2e.json"
    with pytest.raises(AssertionError, match="not measured, or not all of it: toy-wan"):
        start(script, "--toy", "--cases", "toy-wan", "--deadline", "1", "--out", str(out), cwd=tmp_path)
    assert json.loads(out.read_text())[-1]["failed"] == ["toy-wan"]


@pytest.mark.slow
def test_benchmark_on_two_processes(tmp_path: Path) -> None:
    script, out = str(ROOT / "benchmarks" / "e2e.py"), tmp_path / "e2e.json"
    chosen = ["--methods", "plain,auto"]
    start(script, "--toy", "--gpus", "2", "--out", str(out), *chosen, processes=2, cwd=tmp_path)
    found = json.loads(out.read_text())[-1]["context_parallel"]
    assert set(found["scaling"]) == {"dense", "plain", "auto"}
    for kind, error in found["error_against_one"].items():
        assert error < 1e-5, kind
    assert found["attention_same_bits"] == {"plain": True, "auto": True}
    assert found["one"]["density"] == pytest.approx(found["several"]["density"])


@pytest.mark.slow
def test_host_overhead_without_launches(tmp_path: Path) -> None:
    out, chosen = tmp_path / "host.json", ("--methods", "adaspa", "auto")
    told = start(str(ROOT / "benchmarks" / "host_overhead.py"), "--stub", *chosen, "--out", str(out), cwd=tmp_path)
    assert [line.split()[0] for line in told.splitlines()[2:]] == ["adaspa", "auto"]
    for row in json.loads(out.read_text())[-1]["rows"]:
        assert row["replayed"]
        assert 1 < row["engine"] < row["usual"]
        assert row["ours"] < row["again"] < row["usual"]
