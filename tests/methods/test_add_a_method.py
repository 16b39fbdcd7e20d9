"""The page that builds a method from scratch: its files are written out, and its test is run."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from driving import make_run, one_step

import dit_accel.presets as presets
from dit_accel.presets import register_method
from dit_accel.score import SCORES

PAGE = Path(__file__).resolve().parents[2] / "docs/add_a_method.md"


def _files() -> dict[str, str]:
    """Titled code blocks of the page, by title."""
    found = re.findall(r'^```python title="([^"]+)"\n(.*?)^```', PAGE.read_text(), re.DOTALL | re.MULTILINE)
    return dict(found)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, object]]:
    """The page's test module, imported beside the page's method."""
    import dit_accel

    if not hasattr(dit_accel, "register_method"):
        monkeypatch.setattr(dit_accel, "register_method", register_method, raising=False)
    monkeypatch.setattr(presets, "_registered", {})
    monkeypatch.setattr(SCORES, "_entries", dict(SCORES._entries))
    for name, text in _files().items():
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("extremes", "test_extremes"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    namespace: dict[str, object] = {"__name__": "test_extremes"}
    exec(compile((tmp_path / "test_extremes.py").read_text(), "test_extremes.py", "exec"), namespace)
    yield namespace
    sys.modules.pop("extremes", None)


def test_the_page_has_its_two_files() -> None:
    assert list(_files()) == ["extremes.py", "test_extremes.py"]


def test_the_test_of_the_page_passes(module: dict[str, object]) -> None:
    tests = [function for name, function in module.items() if name.startswith("test_")]
    assert len(tests) == 3
    for test in tests:
        assert callable(test)
        test()


@pytest.mark.usefixtures("module")
def test_the_method_runs_by_name_and_in_other_compositions() -> None:
    for changes in ({}, {"density": 0.3}, {"order": "axes", "order_choice": "recall", "compensate": "mean"}):
        run = make_run("extremes", 1, warmup=0.0, **changes)
        for step in range(6):
            one_step(run, step, 6)
        assert run.status().sparse_calls == 6
        assert [plan.step for plan in run.ledger.plans] == [0, 4]
