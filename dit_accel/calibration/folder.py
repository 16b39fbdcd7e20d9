"""What a calibration has done so far, on disk, so that one that was stopped goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dit_accel._files import write_whole

__all__ = ["WorkFolder"]

_FORMAT = "dit_accel.calibration"


class WorkFolder:
    """Files of one calibration; each is whole or absent.

    Args:
        path: made if need be.
        settings: what must be the same for the work to go on, plain JSON types.

    Raises:
        ValueError: if the folder holds the work of other settings, or files that are none of a calibration.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        wanted = json.loads(json.dumps({"format": _FORMAT, **settings}))
        file = self.path / "settings.json"
        found = self._json("settings.json")
        if found is None and file.exists():
            raise ValueError(f"{file} cannot be read; remove the folder to calibrate anew")
        if found is not None and found != wanted:
            keys = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
            raise ValueError(
                f"{self.path} holds a calibration with other settings ({', '.join(keys)} differ); give another folder or "
                "remove it"
            )
        if found is None:
            self._write_json("settings.json", wanted)

    def _json(self, name: str) -> Any:
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def _write_json(self, name: str, data: Any) -> None:
        write_whole(self.path / name, (json.dumps(data, indent=1) + "\n").encode())

    def put_tensors(self, name: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Keep tensors and what belongs to them in one file."""
        held = {key: value.contiguous() for key, value in tensors.items()}
        write_whole(self.path / f"{name}.safetensors", save(held, {"meta": json.dumps(meta)}))

    def tensors(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What :meth:`put_tensors` kept, ``None`` if there is nothing or it cannot be read."""
        file = self.path / f"{name}.safetensors"
        if not file.is_file():
            return None
        try:
            with safe_open(str(file), framework="pt") as opened:
                meta = json.loads((opened.metadata() or {})["meta"])
                return {key: opened.get_tensor(key) for key in opened.keys()}, meta  # noqa: SIM118
        except (SafetensorError, KeyError, ValueError):
            return None

    def result(self, name: str) -> dict[str, Any] | None:
        """A result that was kept, or ``None``."""
        found = self._json(f"{name}.json")
        return found if isinstance(found, dict) else None

    def put_result(self, name: str, data: Mapping[str, Any]) -> None:
        """Keep a result, plain JSON types."""
        self._write_json(f"{name}.json", dict(data))
