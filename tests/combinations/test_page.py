"""The table of combinations says what the tests say."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("compatibility_page", ROOT / "scripts/compatibility_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["compatibility_page"] = module  # dataclasses look for their module there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["compatibility_page"]


def test_page_and_readme_are_up_to_date(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["compatibility_page.py", "--check"])
    assert script.main() == 0, capsys.readouterr().out


def test_every_row_is_a_test(script: Any) -> None:
    rows = script.rows()
    assert len(rows) > 40
    assert {row.group for row in rows} == set(script.GROUPS)
    text = script.page(rows)
    for row in rows:
        file, function = row.test.split("::")
        assert f"def {function}(" in (ROOT / "tests/combinations" / file).read_text(encoding="utf-8")
        assert text.count(f"`{row.test}`") == 1


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        ('"Nowhere", "x", "works"', "group must be one of torch.compile, .*, got 'Nowhere'"),
        ('"Threads", "x", "perhaps"', "result must be one of works, stays dense, refused, not run, got 'perhaps'"),
        (
            '"Threads", "x", "works")\ndef test_b(): ...\n@pytest.mark.combination("Threads", "x", "works"',
            "two tests .* x",
        ),
    ],
)
def test_a_bad_mark_is_said(script: Any, tmp_path: Path, mark: str, message: str) -> None:
    (tmp_path / "test_a.py").write_text(f"@pytest.mark.combination({mark})\ndef test_a(): ...\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        script.rows(tmp_path)


def test_a_readme_without_marks_is_refused(script: Any) -> None:
    with pytest.raises(ValueError, match="once each and in this order"):
        script.readme("# nothing", [])
    marked = f"a\n{script.BEGIN}\nold\n{script.END}\nb"
    assert script.readme(marked, []).startswith("a\n")
    assert "old" not in script.readme(marked, [])
