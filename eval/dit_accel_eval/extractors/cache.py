"""Where weights lie on disk, and reading them: a file whose digest is wrong is never parsed."""

from __future__ import annotations

import hashlib
import io
import os
import pickle  # noqa: TID251 - read through a loader that knows numbers and numpy arrays only, see below
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit_accel_eval.extractors.weights import find

__all__ = ["MissingExtractorError", "cache_dir", "missing", "read", "read_plain", "read_tensors"]

#: Environment variable that names the cache.
VARIABLE = "DIT_ACCEL_EVAL_CACHE"


class MissingExtractorError(ValueError):
    """Weights are not in the cache, or not the ones that were pinned."""


def cache_dir() -> Path:
    """The folder with the weights: ``DIT_ACCEL_EVAL_CACHE``, or ``dit_accel/extractors`` in the user's cache."""
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or (os.environ.get("LOCALAPPDATA") if os.name == "nt" else None)
    return (Path(base) if base else Path.home() / ".cache") / "dit_accel" / "extractors"


def missing(name: str) -> str | None:
    """Why these weights cannot be used here, ``None`` if they are in the cache.

    Raises:
        ValueError: nothing has this name.
    """
    path = cache_dir() / find(name).filename
    if path.is_file():
        return None
    return f"the weights {name!r} are not at {path}; fetch them once with `dit-accel eval setup`"


def read(name: str) -> bytes:
    """The file as it was pinned.

    Raises:
        MissingExtractorError: not in the cache, or its SHA-256 is not the pinned one.
    """
    weights = find(name)
    path = cache_dir() / weights.filename
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise MissingExtractorError(str(missing(name))) from None
    digest = hashlib.sha256(data).hexdigest()
    if digest != weights.sha256:
        raise MissingExtractorError(
            f"{path} has SHA-256 {digest} where {weights.sha256} is pinned; remove it and run `dit-accel eval setup`"
        )
    return data


def read_tensors(name: str) -> dict[str, torch.Tensor]:
    """A checkpoint of torch, read with ``weights_only=True``. Errors are those of :func:`read`."""
    found: dict[str, torch.Tensor] = torch.load(io.BytesIO(read(name)), map_location="cpu", weights_only=True)
    return found


class _PlainUnpickler(pickle.Unpickler):
    """Knows numbers, texts, lists, mappings and numpy arrays; whatever else a file names is refused."""

    def find_class(self, module: str, name: str) -> Any:
        core = getattr(np, "_core", None) or np.core
        known = {"_reconstruct": core.multiarray._reconstruct, "ndarray": np.ndarray, "dtype": np.dtype}
        if module.split(".")[0] == "numpy" and name in known:
            return known[name]
        raise pickle.UnpicklingError(f"{module}.{name} is no plain data")


def read_plain(name: str) -> Any:
    """A pickle of plain data. Errors are those of :func:`read`; anything but data raises ``UnpicklingError``."""
    return _PlainUnpickler(io.BytesIO(read(name))).load()
