"""The documentation builds without a warning, and what it says about names is true."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


@pytest.mark.slow
def test_site_builds_strictly(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    assert (tmp_path / "site/index.html").is_file()


def test_every_page_is_in_the_navigation() -> None:
    nav = (ROOT / "mkdocs.yml").read_text()
    pages = [page for page in DOCS.rglob("*.md") if page.parent.name != "methods_rows"]
    missing = [str(page.relative_to(DOCS)) for page in pages if str(page.relative_to(DOCS)) not in nav]
    assert not missing


def test_every_environment_variable_is_documented() -> None:
    """Each ``DIT_ACCEL_*`` name in the code is in ENV.md, and the other way round."""
    pattern = re.compile(r"\bDIT_ACCEL_[A-Z][A-Z_]*\b")
    used = set()
    for folder in ("dit_accel", "kernels", "patches", "eval"):
        for path in (ROOT / folder).rglob("*.py"):
            used |= set(pattern.findall(path.read_text()))
    documented = set(pattern.findall((ROOT / "ENV.md").read_text()))
    assert used == documented


def test_python_blocks_parse() -> None:
    """Code in the documentation is at least valid Python."""
    pages = [*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    for page in pages:
        for block in re.findall(r"^```python[^\n]*\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            compile(block, str(page), "exec")


def test_the_table_of_methods_is_what_its_rows_say() -> None:
    check = subprocess.run(
        [sys.executable, "scripts/methods_page.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert check.returncode == 0, check.stderr
    from dit_accel.presets import load_methods

    rows = {path.stem for path in (DOCS / "methods_rows").glob("*.md")}
    assert rows == set(load_methods())
