"""Measured times on disk, one small JSON file for each shape, so that a machine measures once."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dit_accel._files import write_whole

__all__ = ["Cost", "CostKey", "CostStore", "cache_dir"]

#: Environment variable that names the folder of caches.
VARIABLE = "DIT_ACCEL_CACHE"
_FORMAT = "dit_accel.cost"
_VERSION = 1


def cache_dir() -> Path:
    """The folder of measured times: ``cost`` in ``DIT_ACCEL_CACHE``, or in ``dit_accel`` of the user's cache."""
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE]).expanduser() / "cost"
    base = os.environ.get("XDG_CACHE_HOME") or (os.environ.get("LOCALAPPDATA") if os.name == "nt" else None)
    return (Path(base) if base else Path.home() / ".cache") / "dit_accel" / "cost"


@dataclass(frozen=True)
class CostKey:
    """What times depend on.

    Attributes:
        device: name of the GPU or processor.
        backend: kernel backend of sparse calls.
        dtype: of queries, without ``torch.``.
        batch: batch elements.
        heads: attention heads.
        head_dim: size of a head.
        tokens: length bucket, the nearest of two to the power of a half integer.
        method: digest of the method's slots, less its name and density.
        versions: of torch, triton and dit_accel.
    """

    device: str
    backend: str
    dtype: str
    batch: int
    heads: int
    head_dim: int
    tokens: int
    method: str
    versions: str


@dataclass(frozen=True)
class Cost:
    """Milliseconds of one attention layer.

    Attributes:
        dense: dense attention as torch does it.
        sparse: ``(density, time)`` of sparse calls, by rising density.
        plan: making a plan, beyond the attention of the step.
    """

    dense: float
    sparse: tuple[tuple[float, float], ...]
    plan: float

    def __post_init__(self) -> None:
        values = [self.dense, self.plan, *(x for pair in self.sparse for x in pair)]
        ok = all(isinstance(v, int | float) and not isinstance(v, bool) and v >= 0 for v in values)
        if not ok or self.dense <= 0 or len(self.sparse) < 2:
            raise ValueError(f"times must be positive, with sparse ones at two densities, got {self}")

    def at(self, density: float) -> float:
        """Time of a sparse call at a density, on the line through the nearest two that were measured."""
        pairs = sorted(self.sparse)
        index = next((i for i in range(1, len(pairs)) if density <= pairs[i][0]), len(pairs) - 1)
        (x0, y0), (x1, y1) = pairs[index - 1], pairs[index]
        return max(y0 + (y1 - y0) * (density - x0) / (x1 - x0), 0.0)


class CostStore:
    """Times by key, in a folder and in memory.

    Args:
        folder: where they lie; left out, :func:`cache_dir`.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._held: dict[CostKey, Cost] = {}

    def _file(self, key: CostKey) -> Path:
        digest = hashlib.sha256(json.dumps(asdict(key), sort_keys=True).encode()).hexdigest()[:24]
        return (self._folder or cache_dir()) / f"{digest}.json"

    def get(self, key: CostKey) -> Cost | None:
        """What was measured, ``None`` if nothing was or the file cannot be read; it is then measured again."""
        if key in self._held:
            return self._held[key]
        try:
            record = json.loads(self._file(key).read_text(encoding="utf-8"))
            if record["format"] != _FORMAT or record["version"] != _VERSION or record["key"] != asdict(key):
                return None
            cost = Cost(record["dense_ms"], tuple((d, t) for d, t in record["sparse_ms"]), record["plan_ms"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        self._held[key] = cost
        return cost

    def put(self, key: CostKey, cost: Cost) -> None:
        """Remember, on disk where that can be written to."""
        self._held[key] = cost
        record: dict[str, Any] = {
            "format": _FORMAT,
            "version": _VERSION,
            "key": asdict(key),
            "dense_ms": cost.dense,
            "sparse_ms": [list(pair) for pair in cost.sparse],
            "plan_ms": cost.plan,
        }
        file = self._file(key)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, (json.dumps(record, indent=2) + "\n").encode())
        except OSError:
            return  # a cache that cannot be written to costs a measurement in each process, nothing else
