"""The folder of a run: where each file lies, who may write, and what is there already."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dit_accel_eval.files import remove_leftovers, replacing, write_json
from dit_accel_eval.runs.errors import EvalError, writing
from dit_accel_eval.runs.settings import RunSettings, Sample
from dit_accel_eval.video import Frames

try:
    import fcntl
except ImportError:  # Windows has none; there nothing keeps a second run out
    fcntl = None  # type: ignore[assignment]

__all__ = ["RunFolder", "slugs"]


def slugs(names: Sequence[str]) -> dict[str, str]:
    """A folder name for each configuration: plain letters, digits and dots, unique."""
    found: dict[str, str] = {}
    for name in names:
        base = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.") or "row"
        slug, count = base, 1
        while slug in found.values():
            count += 1
            slug = f"{base}-{count}"
        found[name] = slug
    return found


class RunFolder:
    """Reads and writes the files of a run. Every file is whole or absent, and a record comes after its clip.

    Args:
        path: the folder.
        names: names of all rows, the baseline included, in order.
        rank: number of this process; each process writes, and cleans up, under its own.
    """

    def __init__(self, path: Path, names: Sequence[str], rank: int = 0) -> None:
        self.path = path
        self.slugs = slugs(names)
        self.rank = rank
        self.owner = f"r{rank}"
        self._lock: Any = None

    def open(self) -> None:
        """Make the folders, keep other runs out, and remove what a killed process left half written.

        Raises:
            EvalError: the folder cannot be written, or another process is writing to it.
        """
        with writing(self.path):
            for slug in self.slugs.values():
                (self.path / "samples" / slug).mkdir(parents=True, exist_ok=True)
            for name in ("plans", "attention", "ranks"):
                (self.path / name).mkdir(exist_ok=True)
            self._take_lock()
            remove_leftovers(self.path, self.owner)
            if self.rank == 0:
                remove_leftovers(self.path)

    def _take_lock(self) -> None:
        lock = (self.path / "ranks" / f"{self.rank}.lock").open("w")
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system frees it when the process ends
            except BlockingIOError:
                lock.close()
                raise EvalError(
                    f"another process writes to {self.path} already (rank {self.rank}); wait for it or give another --out"
                ) from None
        self._lock = lock

    def close(self) -> None:
        """Let others in."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def record_path(self, name: str, sample: Sample) -> Path:
        """Record of one sample."""
        return self.path / "samples" / self.slugs[name] / f"{sample.stem}.json"

    def clip_path(self, name: str, sample: Sample) -> Path:
        """Raw frames of one sample."""
        return self.record_path(name, sample).with_suffix(".npz")

    def plan_path(self, name: str) -> Path:
        """Static plan of one configuration."""
        return self.path / "plans" / f"{self.slugs[name]}.safetensors"

    def attention_path(self, name: str) -> Path:
        """Attention outputs of one configuration against dense."""
        return self.path / "attention" / f"{self.slugs[name]}.json"

    def has(self, name: str, sample: Sample) -> bool:
        """Whether a sample is finished."""
        return self.record_path(name, sample).is_file()

    def missing(self, settings: RunSettings) -> list[tuple[str, Sample]]:
        """Samples without a record."""
        rows = [row.name for row in settings.all_rows]
        return [(name, sample) for sample in settings.samples for name in rows if not self.has(name, sample)]

    def read(self, path: Path) -> dict[str, Any]:
        """One JSON file.

        Raises:
            EvalError: it is not one.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise EvalError(f"{path} cannot be read: {error}; remove it to have it made again") from None
        if not isinstance(data, dict):
            raise EvalError(f"{path} must hold a JSON object, got {type(data).__name__}; remove it")
        return data

    def record(self, name: str, sample: Sample) -> dict[str, Any]:
        """Record of one finished sample.

        Raises:
            EvalError: it is missing or broken.
        """
        return self.read(self.record_path(name, sample))

    def records(self, name: str, samples: Sequence[Sample]) -> list[dict[str, Any]]:
        """Records of one row, in the order of ``samples``."""
        return [self.record(name, sample) for sample in samples if self.has(name, sample)]

    def clip(self, name: str, sample: Sample) -> Frames:
        """Raw frames uint8 ``[T, H, W, 3]``.

        Raises:
            EvalError: the file is missing or broken.
        """
        path = self.clip_path(name, sample)
        try:
            with np.load(path, allow_pickle=False) as data:
                frames: Frames = data["frames"]
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise EvalError(
                f"{path} cannot be read: {error}; remove it and {path.with_suffix('.json').name} to have it made again"
            ) from None
        return frames

    def write(self, path: Path, data: Any) -> None:
        """One JSON file, atomically."""
        with writing(path):
            write_json(path, data, owner=self.owner)

    def save(self, name: str, sample: Sample, record: dict[str, Any], frames: Frames | None) -> None:
        """One finished sample: first the clip, then the record that vouches for it."""
        if frames is not None:
            path = self.clip_path(name, sample)
            with writing(path), replacing(path, owner=self.owner) as temporary:
                np.savez_compressed(temporary, frames=frames)
        self.write(self.record_path(name, sample), record)

    def forget(self, paths: Sequence[Path]) -> int:
        """Remove the files among ``paths`` that tell of an error, so that they are made again; how many."""
        failed = [path for path in paths if path.is_file() and self.read(path).get("error") is not None]
        for path in failed:
            path.unlink()
        return len(failed)
