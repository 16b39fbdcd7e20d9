"""Profiles: settings as JSON, and beside them the static plan of a calibration, if there is one."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_accel._files import write_whole
from dit_accel._version import __version__
from dit_accel.static_plan import StaticPlan
from dit_accel_patches.comfyui.settings import Settings

__all__ = ["Profile", "folder", "names"]

_FORMAT = "dit_accel.comfyui_profile"
_VERSION = 1
_KEYS = {"format", "version", "dit_accel_version", "model", "settings", "plan"}
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._ -]*$")


@dataclass(frozen=True)
class Profile:
    """What one model runs with.

    Attributes:
        model: class name of the diffusion model it was made for.
        settings: the choices of the node.
        plan: static plan, for methods that need one.
    """

    model: str
    settings: Settings
    plan: StaticPlan | None = None

    def save(self, where: Path, name: str) -> Path:
        """Write ``name.json``, and ``name.safetensors`` for the plan; each file appears whole or not at all.

        Returns:
            The JSON file.

        Raises:
            ValueError: if the name could not be a file name everywhere.
        """
        if not _NAME.match(name) or name.endswith((".", " ")):
            raise ValueError(f"a profile's name takes letters, digits, '.', '_', '-' and spaces, got {name!r}")
        where.mkdir(parents=True, exist_ok=True)
        if self.plan is not None:
            self.plan.save(where / f"{name}.safetensors")
        record = {
            "format": _FORMAT,
            "version": _VERSION,
            "dit_accel_version": __version__,
            "model": self.model,
            "settings": self.settings.to_dict(),
            "plan": None if self.plan is None else f"{name}.safetensors",
        }
        path = where / f"{name}.json"
        write_whole(path, (json.dumps(record, indent=2) + "\n").encode())
        return path

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: if the file, or the plan it names, is absent.
            ValueError: if the file is no profile, of a newer version, or has unknown keys.
        """
        if not path.is_file():
            raise FileNotFoundError(f"no profile at {path}")
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not a profile: {error}") from None
        _check(path, record)
        name = record["plan"]
        if name is not None and (not isinstance(name, str) or Path(name).name != name):
            raise ValueError(f"{path}: plan must be the name of a file beside it, got {name!r}")
        plan = None if name is None else StaticPlan.load(path.parent / name)
        return cls(str(record["model"]), Settings.from_dict(record["settings"]), plan)

    def check(self, model: str, twins: tuple[str, ...] = ()) -> None:
        """Refuse another model.

        Raises:
            ValueError: if the profile was made for another class of model.
        """
        if self.model not in (model, *twins):
            raise ValueError(
                f"the profile was made for {self.model}, this model is {model}; load the profile of this model or "
                "disconnect it"
            )

    def __str__(self) -> str:
        """One line."""
        tail = "" if self.plan is None else f", plan for {self.plan.geometry}, {self.plan.steps} steps"
        return f"{self.model}: {self.settings.method}, quality {self.settings.quality}{tail}"


def folder() -> Path:
    """Where profiles lie: ``models/dit_accel`` of ComfyUI."""
    import folder_paths  # type: ignore[import-not-found,unused-ignore]

    return Path(folder_paths.models_dir) / "dit_accel"


def names() -> list[str]:
    """Names of the profiles there are, sorted."""
    try:
        return sorted(path.stem for path in folder().glob("*.json"))
    except ImportError:
        return []


def _check(path: Path, record: Any) -> None:
    if not isinstance(record, dict) or record.get("format") != _FORMAT:
        raise ValueError(f"{path} is not a profile of dit_accel's ComfyUI nodes")
    version = record.get("version")
    if not isinstance(version, int) or version > _VERSION:
        raise ValueError(f"{path} has version {version!r}, this dit_accel reads up to {_VERSION}; update dit_accel")
    if set(record) != _KEYS:
        raise ValueError(f"{path} must have the keys {sorted(_KEYS)}, it has {sorted(record)}")
