"""The way to the Hub and back, against a folder that stands in for it. Nothing here reaches a network."""

from __future__ import annotations

import fnmatch
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import dit_accel
from dit_accel.profiles import Profile
from dit_accel.profiles.hub import is_repo_id

huggingface_hub = pytest.importorskip("huggingface_hub")

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Keeps repositories as folders; files come back from a folder named by the commit, as in the real cache."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.created: list[tuple[str, dict[str, Any]]] = []
        self.downloads: list[tuple[str, str | None]] = []

    def create_repo(self, repo_id: str, **options: Any) -> None:
        self.created.append((repo_id, options))
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)

    def upload_folder(self, *, repo_id: str, folder_path: str, delete_patterns: list[str], **options: Any) -> Any:
        there = self.root / repo_id
        for old in list(there.iterdir()):
            if any(fnmatch.fnmatch(old.name, pattern) for pattern in delete_patterns):
                old.unlink()
        for file in Path(folder_path).iterdir():
            shutil.copy(file, there / file.name)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/{COMMIT}")

    def download(self, repo_id: str, filename: str, *, revision: str | None = None) -> str:
        self.downloads.append((filename, revision))
        source = self.root / repo_id / filename
        if not source.is_file():
            raise _absent(filename)
        snapshot = self.root / "cache" / repo_id / "snapshots" / COMMIT
        snapshot.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, snapshot / filename)
        return str(snapshot / filename)


def _absent(name: str) -> Exception:
    error = huggingface_hub.errors.EntryNotFoundError.__new__(huggingface_hub.errors.EntryNotFoundError)
    error.args = (f"404: {name}",)
    return error


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake.download)
    return fake


def test_there_and_back(profile: Profile, hub: FakeHub) -> None:
    assert profile.push_to_hub("me/wan-profile", private=True) == f"https://hub/me/wan-profile/commit/{COMMIT}"
    assert hub.created == [("me/wan-profile", {"repo_type": "model", "private": True, "exist_ok": True})]
    found = Profile.from_hub("me/wan-profile", revision="v1")
    assert str(found).splitlines()[0] == str(profile).splitlines()[0]
    assert found.components["transformer"].curve is not None
    assert hub.downloads[0] == ("profile.json", "v1")
    assert hub.downloads[1][1] == COMMIT  # of one upload, whatever "v1" has become meanwhile


def test_the_card_says_what_it_is(profile: Profile, hub: FakeHub) -> None:
    profile.push_to_hub("me/p")
    card = (hub.root / "me/p/README.md").read_text()
    assert card.startswith("---\nlibrary_name: dit_accel")
    assert "WanTransformer3DModel" in card


def test_a_second_upload_leaves_no_tensors_of_the_first(profile: Profile, hub: FakeHub) -> None:
    from made import make_component, make_profile

    profile.push_to_hub("me/p")
    make_profile(make_component(1, 1, 1)).push_to_hub("me/p")
    assert len(list((hub.root / "me/p").glob("*.safetensors"))) == 1
    assert len(Profile.from_hub("me/p").components["transformer"].layers) == 1


def test_a_repository_without_a_profile(hub: FakeHub) -> None:
    hub.create_repo("me/other")
    with pytest.raises(ValueError, match=r"me/other holds no profile\.json"):
        Profile.from_hub("me/other")


def test_no_connection_is_not_told_as_a_missing_profile(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **options: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("check your connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(ValueError, match=r"me/p: profile\.json could not be fetched.*check your connection"):
        Profile.from_hub("me/p")


def test_enable_takes_a_name_on_the_hub(profile: Profile, hub: FakeHub, pipe: Any) -> None:
    profile.push_to_hub("me/p")
    with pytest.raises(ValueError, match="3 attention layers of WanTransformer3DModel, this one has 2"):
        dit_accel.enable(pipe, profile="me/p")  # it came, and is for a model of another size


@pytest.mark.parametrize("name", ["me", "a/b/c", "../x", "./x", "me/p.json", "", "me/ p"])
def test_names_that_are_none(name: str) -> None:
    assert not name or not is_repo_id(name)
    with pytest.raises(ValueError, match="repo_id must be 'owner/name'"):
        Profile.from_hub(name)


def test_without_the_library(profile: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        profile.push_to_hub("me/p")
