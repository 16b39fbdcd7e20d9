"""The wheel holds four packages and nothing else, and works where only it and its dependencies are installed."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"dit_accel", "dit_accel_kernels", "dit_accel_patches", "dit_accel_eval"}

pytestmark = pytest.mark.slow


def _run(*command: str, cwd: Path) -> str:
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "TRITON_INTERPRET")}
    run = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build without isolation, so that no network is needed: hatchling is one of the test dependencies."""
    pytest.importorskip("hatchling")
    pytest.importorskip("build")
    out = tmp_path_factory.mktemp("wheel")
    _run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT), cwd=out)
    (made,) = out.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a fresh environment that holds the wheel, and sees torch but not this repository.

    A ``.pth`` entry in a folder that is itself named by a ``.pth`` is not followed, so the editable install of the
    environment that runs the tests does not reach the fresh one.
    """
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    scripts = folder / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / ("python.exe" if os.name == "nt" else "python")
    site = _run(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    _run(*pip, str(wheel), cwd=folder)
    Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return scripts


def test_top_level_names(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    info = {top for top in tops if top.endswith(".dist-info")}
    assert len(info) == 1
    assert tops - info == PACKAGES


def test_holds_types_data_and_licence(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for package in sorted(PACKAGES):
        assert f"{package}/py.typed" in names
        data = [path for kind in ("json", "c") for path in ROOT.glob(f"**/{package}/**/*.{kind}")]
        for path in data:
            inside = path.relative_to(next(parent for parent in path.parents if parent.name == package).parent)
            assert inside.as_posix() in names
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert not [name for name in names if name.endswith((".pyc", ".pt", ".pkl"))]


def test_names_its_entry_points(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (path,) = (name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
    text = archive.read(path).decode()
    assert "dit-accel = dit_accel.cli:main" in text
    assert "[dit_accel.adapters]" in text


def test_command_runs_in_a_clean_environment(clean: Path, tmp_path: Path) -> None:
    from dit_accel._version import __version__

    assert __version__ in _run(str(clean / "dit-accel"), "--version", cwd=tmp_path)


def test_imports_in_a_clean_environment(clean: Path, tmp_path: Path) -> None:
    names = ", ".join(sorted(PACKAGES))
    probe = f"import {names}; print(dit_accel.__file__); print(len(dit_accel.methods()), dit_accel.__version__)"
    out = _run(str(clean / "python"), "-c", probe, cwd=tmp_path)
    where = Path(out.splitlines()[0]).resolve()
    assert clean.parent.resolve() in where.parents, f"imported {where}, not the wheel's copy"


def test_hides_no_other_package(clean: Path, tmp_path: Path) -> None:
    """Folders of the repository are not importable from an installed wheel."""
    probe = (
        "from importlib.util import find_spec\n"
        "for name in ('patches', 'eval', 'tests', 'examples', 'benchmarks', 'docs', 'scripts'):\n"
        "    spec = find_spec(name)\n"
        f"    assert spec is None or not str(spec.origin).startswith({str(ROOT)!r}), spec\n"
    )
    _run(str(clean / "python"), "-c", probe, cwd=tmp_path)
