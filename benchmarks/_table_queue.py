"""What the workers of a table share: who does which row, and results that all of them need."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_accel_eval.files import read_records, replacing

__all__ = ["RowQueue", "read_samples"]

_WAIT = 300.0  # seconds for a result of another worker, after which it is taken for dead


class RowQueue:
    """Claims as files of a folder: whoever creates one has the row.

    Args:
        out: folder of the table; claims and shared results lie in ``at_work`` in it, for the time of a run.
        owner: who claims, written into the claim.
    """

    def __init__(self, out: Path, owner: str) -> None:
        self.folder, self.owner = out / "at_work", owner
        self.folder.mkdir(parents=True, exist_ok=True)

    def clear(self) -> None:
        """Forget the claims and results of an earlier run."""
        shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)

    def take(self, what: str) -> bool:
        """Claim something; false if somebody has."""
        name = hashlib.sha1(what.encode()).hexdigest()[:16]
        try:
            with (self.folder / f"claim_{name}").open("x", encoding="utf-8") as file:
                file.write(f"{what}: {self.owner}\n")
        except FileExistsError:
            return False
        return True

    def shared(self, name: str, make: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """An array that the first to ask makes, and the others wait for; made once more where that worker is gone."""
        path = self.folder / f"{name}.npy"
        until = time.monotonic() + _WAIT
        if not self.take(name):
            while not path.is_file() and time.monotonic() < until:
                time.sleep(0.2)
        if not path.is_file():
            with replacing(path) as temporary:
                np.save(temporary, make())
        return np.asarray(np.load(path))


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """Records of all workers and runs in a folder, the later one where a sample was made twice."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for path in sorted(folder.glob("samples_*.jsonl")):
        for record in read_records(path):
            found[record["name"], record["prompt"]] = record
    return list(found.values())
