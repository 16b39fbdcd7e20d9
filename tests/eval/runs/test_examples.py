"""The examples: they compile, and what can be checked without a model is."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
NAMES = ("compare_methods", "tune_to_target", "evaluate_your_pipeline")


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", NAMES)
def test_examples_compile_and_are_listed(name: str) -> None:
    compile((EXAMPLES / f"{name}.py").read_text(encoding="utf-8"), name, "exec")
    assert f"[{name}.py]({name}.py)" in (EXAMPLES / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("target", "best"), [(20.0, 0.5), (20.1, 0.5625), (5.0, 0.125), (40.0, 1.0)])
def test_bisection_finds_the_lowest_density(target: float, best: float) -> None:
    tried: list[float] = []

    def psnr_at(density: float) -> float:
        tried.append(density)
        return 40 * density

    assert load("tune_to_target").bisect(psnr_at, target, 4) == best
    assert len(tried) == 5


def test_bisection_says_when_nothing_does() -> None:
    assert load("tune_to_target").bisect(lambda density: 10.0, 20.0, 4) is None


def test_the_notebook_is_small_and_without_outputs() -> None:
    path = EXAMPLES / "evaluate.ipynb"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert path.stat().st_size < 10_000
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
            compile("".join(cell["source"]), "cell", "exec")
