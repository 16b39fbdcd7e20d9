"""Sharing profiles through the Hugging Face Hub: a model repository with ``profile.json``, its tensors and a card."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dit_accel.profiles.profile import Profile

__all__ = ["is_repo_id", "pull", "push"]

_FILE = "profile.json"
_REPO = re.compile(r"^[\w.\-]+/[\w.\-]+$")


def is_repo_id(text: str) -> bool:
    """Whether a text looks like ``owner/name`` of the Hub rather than a file."""
    return (
        bool(text)
        and _REPO.match(text) is not None
        and not text.endswith(".json")
        and ".." not in text
        and text[0] != "."
    )


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise ImportError("sharing profiles needs huggingface_hub: pip install huggingface_hub") from None
    return huggingface_hub


def _checked(repo_id: str) -> str:
    if not isinstance(repo_id, str) or not is_repo_id(repo_id):
        raise ValueError(f"repo_id must be 'owner/name', got {repo_id!r}")
    return repo_id


def push(profile: Profile, repo_id: str, *, private: bool | None = None, message: str = "Upload profile") -> str:
    """Upload a profile; see :meth:`Profile.push_to_hub`. What of an older profile does not belong to it is removed."""
    api = _hub().HfApi()
    api.create_repo(_checked(repo_id), repo_type="model", private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        profile.save(folder)
        Path(folder, "README.md").write_text(_card(profile), encoding="utf-8")
        done = api.upload_folder(
            repo_id=repo_id,
            repo_type="model",
            folder_path=folder,
            commit_message=message,
            delete_patterns=["profile.*.safetensors"],
        )
    return str(getattr(done, "commit_url", done))


def pull(repo_id: str, revision: str | None = None) -> Profile:
    """Download a profile; see :meth:`Profile.from_hub`."""
    from dit_accel.profiles.profile import Profile

    hub = _hub()
    where = f"{_checked(repo_id)}" + (f" at {revision}" if revision else "")
    try:
        file = Path(hub.hf_hub_download(repo_id, _FILE, revision=revision))
    except hub.errors.LocalEntryNotFoundError as error:  # no connection; one of the kind below, but no missing file
        raise ValueError(f"{where}: {_FILE} could not be fetched, and no copy of it is kept here ({error})") from None
    except hub.errors.EntryNotFoundError:
        raise ValueError(f"{where} holds no {_FILE}; Profile.push_to_hub writes one") from None
    try:
        name = json.loads(file.read_text(encoding="utf-8")).get("tensors")
    except (ValueError, AttributeError):
        name = None  # loading says what is wrong
    if isinstance(name, str) and Path(name).name == name:
        # The commit that the JSON came from, so that both are of one upload; it is the folder of the download.
        commit = file.parent.name if re.fullmatch(r"[0-9a-f]{40}", file.parent.name) else revision
        hub.hf_hub_download(repo_id, name, revision=commit)
    return Profile.load(file)


def _card(profile: Profile) -> str:
    models = sorted({part.model for part in profile.components.values()})
    return f"""---
library_name: dit_accel
tags: [dit_accel, sparse-attention, diffusion]
---

# {profile.name or "dit_accel profile"}

Settings of sparse attention for {", ".join(models)}.

```python
import dit_accel
dit_accel.enable(pipe, profile="OWNER/NAME")
```

```
{profile}
```
"""
